//! A cluster that goes on from a backup needs a root that signs for its new manager. A signer outside believes managers by
//! their certificates, and the new one has none: so its root cannot sign, and another one has to.

use bulkhead_identity::authority::Authority;
use bulkhead_proto::wire::{Cluster, FormerRoot, Rotation, RotationPhase};
use bulkhead_proto::{ClusterId, limits};

use super::{CaError, millis, trust};
use crate::key_ring::{KeyRing, cluster_place};

/// What a restored cluster begins with.
#[derive(Debug, Clone, PartialEq)]
pub struct Refounded {
    /// The cluster, whose issuing root's key is in it.
    pub cluster: Cluster,
    /// Whether that root is one that nobody trusts yet: everyone has to join again.
    pub is_new: bool,
}

/// The cluster with a root that signs here. Where one that nodes trust has its key in the cluster, it is that one: of a
/// rotation that leads to a signer outside the old root, of one that leads away from it the new root. Else it is a new one.
///
/// # Errors
/// [`CaError`].
pub fn refounded(cluster: &Cluster, ring: &KeyRing, now_ms: i64) -> Result<Refounded, CaError> {
    let known = |cluster| Refounded {
        cluster,
        is_new: false,
    };
    if trust::issuer(cluster).outside.is_none() {
        return Ok(known(cluster.clone()));
    }
    if let Some(rotation) = &cluster.rotation {
        let phase = match rotation.phase() {
            // Whoever knows the old root alone follows to the new one by the cross-certificate.
            RotationPhase::Bundle | RotationPhase::Unspecified => RotationPhase::Issue,
            RotationPhase::Issue => RotationPhase::Bundle,
        };
        let rotation = Rotation {
            phase: phase.into(),
            ..rotation.clone()
        };
        let other = Cluster {
            rotation: Some(rotation),
            ..cluster.clone()
        };
        if trust::issuer(&other).outside.is_none() {
            return Ok(known(other));
        }
    }
    let id = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| CaError::NoRoot)?;
    let place = cluster_place(cluster).ok_or(CaError::NoRoot)?;
    let from = now_ms.saturating_sub(millis(limits::CERTIFICATE_BACKDATE));
    let root = Authority::generate(id, from)?;
    let cluster = Cluster {
        root_certificate: root.root_der().to_vec(),
        root_key: Some(ring.seal(cluster, place, root.key_pkcs8())?),
        external_signer: None,
        rotation: None,
        // Nothing leads from it to the new one; it only tells who asks with an old ticket what became of it.
        former: vec![FormerRoot {
            root: cluster.root_certificate.clone(),
            cross: Vec::new(),
            until: now_ms.saturating_add(millis(limits::RETURN_GRACE)),
        }],
        ..cluster.clone()
    };
    Ok(Refounded {
        cluster,
        is_new: true,
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::bundle::Root;
    use bulkhead_proto::wire::ExternalSigner;

    use super::*;
    use crate::testing::Founded;
    use crate::view;

    const NOW: i64 = 1_700_000_000_000;

    /// A cluster with a root of its own, and one that is outside.
    fn founded() -> (Founded, Cluster, Authority) {
        let founded = Founded::new(NOW);
        let cluster = view::cluster(&founded.state).expect("begun").clone();
        let id = ClusterId::try_from(cluster.id.as_slice()).expect("its id");
        let outside = Authority::generate(id, NOW).expect("a root");
        (founded, cluster, outside)
    }

    fn signer() -> Option<ExternalSigner> {
        Some(ExternalSigner {
            url: "https://signer.example:8443".into(),
            ca: vec![1],
        })
    }

    /// The root that signs, whose key opens here.
    fn issuer(founded: &Founded, cluster: &Cluster) -> Vec<u8> {
        let issuer = trust::issuer(cluster);
        let place = cluster_place(cluster).expect("its id");
        let pkcs8 = founded.ring.open(cluster, place, issuer.key.expect("a key"));
        Authority::from_parts(issuer.root, &pkcs8.expect("it opens")).expect("its own key");
        issuer.root.to_vec()
    }

    #[test]
    fn a_root_with_its_key_in_the_cluster_stays() {
        let (founded, cluster, outside) = founded();
        let refounded = |cluster: &Cluster| refounded(cluster, &founded.ring, NOW).expect("a root");
        let as_it_was = refounded(&cluster);
        assert_eq!((&as_it_was.cluster, as_it_was.is_new), (&cluster, false));
        let leads_outside = |phase: RotationPhase| Cluster {
            rotation: Some(Rotation {
                phase: phase.into(),
                root: outside.root_der().to_vec(),
                external_signer: signer(),
                ..Default::default()
            }),
            ..cluster.clone()
        };
        for phase in [RotationPhase::Bundle, RotationPhase::Issue] {
            let back = refounded(&leads_outside(phase));
            assert!(!back.is_new, "{phase:?}");
            assert_eq!(
                issuer(&founded, &back.cluster),
                cluster.root_certificate,
                "{phase:?}"
            );
            assert_eq!(back.cluster, leads_outside(RotationPhase::Bundle), "{phase:?}");
        }
    }

    #[test]
    fn a_rotation_away_from_a_signer_outside_goes_on_with_the_new_root() {
        let (founded, cluster, outside) = founded();
        let away = Cluster {
            root_certificate: outside.root_der().to_vec(),
            root_key: None,
            external_signer: signer(),
            rotation: Some(Rotation {
                phase: RotationPhase::Bundle.into(),
                root: cluster.root_certificate.clone(),
                root_key: cluster.root_key.clone(),
                cross: vec![1],
                ..Default::default()
            }),
            ..cluster.clone()
        };
        let on = refounded(&away, &founded.ring, NOW).expect("a root");
        assert!(!on.is_new);
        assert_eq!(issuer(&founded, &on.cluster), cluster.root_certificate);
    }

    #[test]
    fn where_every_key_is_outside_a_new_root_begins() {
        let (founded, cluster, outside) = founded();
        let all_outside = Cluster {
            root_certificate: outside.root_der().to_vec(),
            root_key: None,
            external_signer: signer(),
            ..cluster.clone()
        };
        let new = refounded(&all_outside, &founded.ring, NOW).expect("a root");
        assert!(new.is_new);
        let root = issuer(&founded, &new.cluster);
        assert_eq!(
            Root::from_der(&root).expect("a root").cluster(),
            outside.cluster()
        );
        assert_ne!(root, outside.root_der());
        assert_eq!(
            trust::former(&new.cluster),
            None,
            "nothing leads from the old one"
        );
    }
}
