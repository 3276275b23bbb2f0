//! How a service is written when an operator creates, changes or removes it.
//!
//! A version's number stands for what makes a task. So a change of that adds a version, and whatever else a spec
//! says (replicas, labels, the restart and update policies) is changed in the newest version in place: a task is
//! current exactly if it points to the newest number.

use bulkhead_proto::wire::{self, UpdateState};
use bulkhead_proto::{ServiceId, limits};

/// Why a service cannot be changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviseError {
    /// Its removal was asked for.
    #[error("the service is being removed; wait until it is gone, then create it anew")]
    Removing,
    /// A name is a service's for its life.
    #[error("the service is named '{was}'; a service cannot be renamed, create another one")]
    Renamed {
        /// The name it has.
        was: String,
    },
    /// Too many updates follow each other before their tasks could.
    #[error(
        "{} specs of the service are in use at once; wait until the update has moved its replicas on",
        limits::SPEC_VERSIONS
    )]
    TooManyVersions,
}

/// A new service.
pub fn create(id: ServiceId, spec: wire::ServiceSpec, now_ms: i64) -> wire::Service {
    wire::Service {
        id: id.to_wire(),
        versions: vec![version(1, spec, now_ms)],
        ..Default::default()
    }
}

/// The service with another spec. The same spec again retries an update that was paused.
pub fn revise(
    service: &wire::Service,
    spec: wire::ServiceSpec,
    now_ms: i64,
) -> Result<wire::Service, ReviseError> {
    if service.removing {
        return Err(ReviseError::Removing);
    }
    let mut service = service.clone();
    let paused = service.update.as_ref().map(wire::UpdateStatus::state) == Some(UpdateState::Paused);
    let number = match service.versions.last_mut() {
        Some(newest) => {
            let old = newest.spec.take().unwrap_or_default();
            if old.name != spec.name {
                return Err(ReviseError::Renamed { was: old.name });
            }
            let retried = paused && old == spec;
            if template(&old) == template(&spec) && !retried {
                newest.spec = Some(spec);
                return Ok(service);
            }
            newest.spec = Some(old);
            newest.number + 1
        }
        None => 1,
    };
    if service.versions.len() >= limits::SPEC_VERSIONS {
        return Err(ReviseError::TooManyVersions);
    }
    service.versions.push(version(number, spec, now_ms));
    service.update = Some(wire::UpdateStatus {
        state: UpdateState::Updating.into(),
        message: String::new(),
        since: now_ms,
    });
    Ok(service)
}

/// The service with its removal asked for: the leader ends its tasks, then deletes it.
pub fn remove(service: &wire::Service) -> wire::Service {
    wire::Service {
        removing: true,
        ..service.clone()
    }
}

fn version(number: u64, spec: wire::ServiceSpec, created_at: i64) -> wire::ServiceVersion {
    wire::ServiceVersion {
        number,
        spec: Some(spec),
        created_at,
    }
}

/// What of a spec makes a task.
fn template(spec: &wire::ServiceSpec) -> wire::ServiceSpec {
    wire::ServiceSpec {
        labels: Vec::new(),
        replicas: 0,
        restart: None,
        update: None,
        ..spec.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> wire::Service {
        create(ServiceId::from_bytes([1; 16]), spec("web", 3, "a:1"), 5)
    }

    fn spec(name: &str, replicas: u32, image: &str) -> wire::ServiceSpec {
        wire::ServiceSpec {
            name: name.into(),
            replicas,
            image_name: image.into(),
            ..Default::default()
        }
    }

    fn numbers(service: &wire::Service) -> Vec<u64> {
        service.versions.iter().map(|version| version.number).collect()
    }

    #[test]
    fn a_scale_changes_the_newest_version_in_place() {
        let scaled = revise(&service(), spec("web", 9, "a:1"), 6).expect("revised");
        assert_eq!((numbers(&scaled), scaled.update), (vec![1], None));
        assert_eq!(scaled.versions[0].spec, Some(spec("web", 9, "a:1")));
    }

    #[test]
    fn what_makes_a_task_makes_a_version_and_starts_an_update() {
        let updated = revise(&service(), spec("web", 3, "a:2"), 6).expect("revised");
        assert_eq!(numbers(&updated), [1, 2]);
        let status = updated.update.expect("a status");
        assert_eq!((status.state(), status.since), (UpdateState::Updating, 6));
    }

    #[test]
    fn the_same_again_retries_only_a_paused_update() {
        assert_eq!(revise(&service(), spec("web", 3, "a:1"), 6), Ok(service()));
        let mut paused = service();
        paused.update = Some(wire::UpdateStatus {
            state: UpdateState::Paused.into(),
            ..Default::default()
        });
        let scaled = revise(&paused, spec("web", 4, "a:1"), 6).expect("revised");
        assert_eq!((numbers(&scaled), &scaled.update), (vec![1], &paused.update));
        let retried = revise(&paused, spec("web", 3, "a:1"), 6).expect("revised");
        assert_eq!(numbers(&retried), [1, 2]);
    }

    #[test]
    fn what_cannot_be_revised_is_refused() {
        let removing = remove(&service());
        assert_eq!(
            revise(&removing, spec("web", 1, "a:1"), 6),
            Err(ReviseError::Removing)
        );
        assert_eq!(
            revise(&service(), spec("other", 3, "a:1"), 6),
            Err(ReviseError::Renamed { was: "web".into() })
        );
        let mut many = service();
        for n in 2..=limits::SPEC_VERSIONS {
            many = revise(&many, spec("web", 3, &format!("a:{n}")), 6).expect("revised");
        }
        assert_eq!(
            revise(&many, spec("web", 3, "a:x"), 6),
            Err(ReviseError::TooManyVersions)
        );
        assert!(
            revise(&many, spec("web", 9, &format!("a:{}", limits::SPEC_VERSIONS)), 6).is_ok(),
            "a scale adds none"
        );
    }
}
