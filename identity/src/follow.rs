//! How a node follows its cluster through a rotation of the root, as one pure decision: managers, workers and contexts
//! each learn in their own way what the cluster trusts, and do the same about it.

use bulkhead_proto::wire::RenewRequest;
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use tonic::transport::Channel;

use crate::comeback::ComebackError;
use crate::seam::Entropy;
use crate::{Bundle, Certificate, Credentials, Key};

/// What the cluster says of its roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told<'a> {
    /// The roots to trust, DER, oldest first; none where nobody spoke yet.
    pub roots: &'a [Vec<u8>],
    /// The root by which managers still meet each other ([`crate::Bundle::with_former`]); nobody else is told of one.
    pub former: Option<&'a [u8]>,
    /// Key id of the root that signs now.
    pub issuer: &'a [u8],
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Trust the roots; the certificate stays.
    Trust,
    /// Ask for a certificate of the root that signs.
    Renew,
}

/// What who has these credentials does next, if anything.
pub fn due(current: &Credentials, told: &Told<'_>) -> Option<Due> {
    let bundle = &current.bundle;
    if told.roots.is_empty() {
        return None;
    }
    if bundle.ders() != told.roots || bundle.former() != told.former {
        return Some(Due::Trust);
    }
    // A root that is not among those to trust would leave the node with a certificate that it does not believe itself.
    let mut roots = bundle.roots().iter();
    let issuer = roots.find(|root| root.key_id().as_bytes()[..] == *told.issuer)?;
    (!issuer.is_issuer_of(&current.certificate)).then_some(Due::Renew)
}

/// A new key with its certificate, which whoever holds this channel's identity asks for. Nothing is kept here.
///
/// # Errors
/// [`ComebackError`].
pub async fn renew(channel: Channel, entropy: &dyn Entropy) -> Result<Credentials, ComebackError> {
    let key = Key::generate()?;
    let mut request_id = vec![0; 16];
    entropy.fill(&mut request_id)?;
    let request = RenewRequest {
        csr: key.csr()?,
        request_id,
        ..Default::default()
    };
    let answer = DispatcherClient::new(channel).renew(request).await;
    let answer = answer.map_err(Box::new)?.into_inner();
    Ok(Credentials {
        key,
        certificate: Certificate::from_der(&answer.certificate)?,
        chain: answer.chain,
        bundle: Bundle::from_ders(answer.roots)?,
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::Role;

    use super::*;
    use crate::testing::{authority, credentials};
    use crate::{Authority, Bundle};

    #[test]
    fn roots_come_first_and_then_a_certificate_of_the_one_that_signs() {
        let (old, new, other) = (authority(), authority(), authority());
        let der = |root: &Authority| root.root_der().to_vec();
        let id = |root: &Authority| Bundle::from_ders(vec![der(root)]).expect("a root").key_ids()[0].clone();
        let current = |trusted: &[&Authority], issuer: &Authority| {
            let roots = trusted.iter().map(|root| der(root)).collect();
            Credentials {
                bundle: Bundle::from_ders(roots).expect("roots"),
                ..credentials(issuer, Role::Worker, 1)
            }
        };
        let both = [der(&old), der(&new)];
        for (trusts, has, roots, issuer, want) in [
            (&[&old][..], &old, &both[..], &old, Some(Due::Trust)),
            (&[&old], &old, &both, &new, Some(Due::Trust)),
            (&[&old, &new], &old, &both, &old, None),
            (&[&old, &new], &old, &both, &new, Some(Due::Renew)),
            (&[&old, &new], &new, &both, &new, None),
            (&[&old, &new], &new, &both[1..], &new, Some(Due::Trust)),
            (&[&new], &new, &both[1..], &new, None),
            // Back again, and told nothing, and an issuer that is not to be trusted.
            (&[&old, &new], &old, &both[..1], &old, Some(Due::Trust)),
            (&[&old], &old, &[], &new, None),
            (&[&old], &old, &both[..1], &other, None),
        ] {
            let issuer = id(issuer);
            let told = Told {
                roots,
                former: None,
                issuer: &issuer,
            };
            assert_eq!(due(&current(trusts, has), &told), want, "{roots:?}");
        }
        let manager = current(&[&new], &new);
        let (issuer, former) = (id(&new), der(&old));
        let told = Told {
            roots: &both[1..],
            former: Some(&former),
            issuer: &issuer,
        };
        assert_eq!(due(&manager, &told), Some(Due::Trust));
        let bundle = manager.bundle.clone().with_former(Some(&former)).expect("a root");
        assert_eq!(due(&Credentials { bundle, ..manager }, &told), None);
    }
}
