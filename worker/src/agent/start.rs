//! From an assignment and its image to what the launcher is asked to start.

use super::assignment::{Assignment, Image};
use bulkhead_launcher::message::{Limits, SecretFile, TaskId as LaunchId, TaskSpec, Tmpfs};
use bulkhead_proto::limits;

/// Why a task cannot be described to the launcher. The task is rejected with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// Neither the service nor the image names a program.
    #[error("the image '{image}' names no program; give one after `--`")]
    NoProgram {
        /// The image's name.
        image: String,
    },
    /// A variable without `=`.
    #[error("the environment entry '{entry}' has no '='")]
    Environment {
        /// What came.
        entry: String,
    },
}

/// Describes the task. `secret_sizes` has one entry for each of the assignment's secrets, in their order.
pub fn task_spec(
    assignment: &Assignment,
    image: &Image,
    secret_sizes: &[u32],
) -> Result<TaskSpec, StartError> {
    assert_eq!(
        assignment.secrets.len(),
        secret_sizes.len(),
        "each secret has its size"
    );
    let spec = &assignment.spec;
    let task =
        LaunchId::try_from(assignment.task.to_string()).expect("26 letters and digits suit the launcher");
    Ok(TaskSpec {
        task,
        epoch: assignment.fence,
        layers: image.layers.iter().map(super::Layer::diff_id).collect(),
        argv: argv(assignment, image)?,
        env: environment(assignment, image)?,
        user: first_not_empty(&spec.user, &image.config.user),
        workdir: image.config.working_dir.clone(),
        hostname: host_name(&assignment.service_name, assignment.slot),
        tmpfs: spec.tmpfs.iter().map(tmpfs).collect(),
        limits: task_limits(assignment),
        secrets: assignment
            .secrets
            .iter()
            .zip(secret_sizes)
            .map(|((_, name), size)| SecretFile {
                name: name.clone(),
                size: *size,
            })
            .collect(),
        stop_grace_ms: u64::try_from(assignment.stop_grace.as_millis()).unwrap_or(u64::MAX),
    })
}

/// As `docker run` does: a command replaces entrypoint and command of the image, arguments replace its command only.
fn argv(assignment: &Assignment, image: &Image) -> Result<Vec<String>, StartError> {
    let spec = &assignment.spec;
    let (program, arguments) = match (spec.command.is_empty(), spec.arguments.is_empty()) {
        (false, _) => (&spec.command, &spec.arguments),
        (true, false) => (&image.config.entrypoint, &spec.arguments),
        (true, true) => (&image.config.entrypoint, &image.config.command),
    };
    let argv: Vec<String> = program.iter().chain(arguments).cloned().collect();
    if argv.is_empty() {
        return Err(StartError::NoProgram {
            image: image.name.clone(),
        });
    }
    Ok(argv)
}

/// The image's variables, in place of each the service's of the same name, then the service's others.
fn environment(assignment: &Assignment, image: &Image) -> Result<Vec<(String, String)>, StartError> {
    let mut variables: Vec<(String, String)> = Vec::new();
    for entry in image
        .config
        .environment
        .iter()
        .chain(&assignment.spec.environment)
    {
        let (name, value) = entry
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| StartError::Environment {
                entry: entry.chars().take(80).collect(),
            })?;
        match variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => variables.push((name.to_owned(), value.to_owned())),
        }
    }
    Ok(variables)
}

fn task_limits(assignment: &Assignment) -> Limits {
    let asked = assignment.spec.limit.unwrap_or_default();
    Limits {
        memory_bytes: or_default(asked.memory_bytes, limits::TASK_MEMORY_BYTES),
        pids: if asked.pids == 0 {
            limits::TASK_PIDS
        } else {
            asked.pids
        },
        // More than u32 thousandths is no limit on any machine.
        cpu_millis: u32::try_from(asked.cpu_millis).ok().filter(|millis| *millis > 0),
        log_bytes: limits::TASK_LOG_BYTES,
        ..Limits::default()
    }
}

fn tmpfs(mount: &bulkhead_proto::wire::TmpfsMount) -> Tmpfs {
    Tmpfs {
        path: mount.path.clone(),
        size_bytes: or_default(mount.size_bytes, limits::TASK_TMP_BYTES),
    }
}

fn or_default(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

fn first_not_empty(first: &str, second: &str) -> String {
    if first.is_empty() { second } else { first }.to_owned()
}

/// `service-slot`, within the 63 characters of a label (RFC 1035): of a long name the end goes, not the slot.
fn host_name(service: &str, slot: u32) -> String {
    let slot = format!("-{slot}");
    let name: String = service.chars().take(limits::NAME_CHARS - slot.len()).collect();
    name + &slot
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::assignments::tests::{wire_image, wire_task};
    use bulkhead_proto::wire;

    fn spec_of(service: wire::ServiceSpec, config: wire::ImageConfig) -> Result<TaskSpec, StartError> {
        let mut task = wire_task(1, wire::DesiredState::Running);
        task.spec = Some(wire::ServiceSpec {
            image_id: vec![7; 16],
            ..service
        });
        let image = wire::Image {
            config: Some(config),
            ..wire_image()
        };
        let assignment = Assignment::try_from(task).expect("assignment");
        let sizes = vec![3; assignment.secrets.len()];
        task_spec(&assignment, &Image::try_from(image).expect("image"), &sizes)
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn the_program_comes_from() {
        let cases = [
            ("", "", "/entry -e", "cmd", Some("/entry -e cmd")),
            ("", "a b", "/entry", "cmd", Some("/entry a b")),
            ("/other", "a", "/entry", "cmd", Some("/other a")),
            ("/other", "", "/entry", "cmd", Some("/other")),
            ("", "", "", "/cmd", Some("/cmd")),
            ("", "", "", "", None),
        ];
        for (command, arguments, entrypoint, image_command, expected) in cases {
            let service = wire::ServiceSpec {
                command: words(command),
                arguments: words(arguments),
                ..Default::default()
            };
            let config = wire::ImageConfig {
                entrypoint: words(entrypoint),
                command: words(image_command),
                ..Default::default()
            };
            let got = spec_of(service, config).map(|spec| spec.argv.join(" "));
            let expected = expected.map(String::from).ok_or(StartError::NoProgram {
                image: "web:1".into(),
            });
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn the_services_variables_replace_the_images_in_place() {
        let service = wire::ServiceSpec {
            command: words("/x"),
            environment: words("B=2=3 C="),
            ..Default::default()
        };
        let config = wire::ImageConfig {
            environment: words("B=1 A=1"),
            ..Default::default()
        };
        let spec = spec_of(service.clone(), config).expect("spec");
        let shown: Vec<_> = spec
            .env
            .iter()
            .map(|(name, value)| format!("{name}:{value}"))
            .collect();
        assert_eq!(shown, ["B:2=3", "A:1", "C:"]);
        for bad in ["novalue", "=x"] {
            let config = wire::ImageConfig {
                environment: words(bad),
                ..Default::default()
            };
            assert_eq!(
                spec_of(service.clone(), config),
                Err(StartError::Environment { entry: bad.into() })
            );
        }
    }

    #[test]
    fn absent_limits_are_the_defaults() {
        let service = wire::ServiceSpec {
            command: words("/x"),
            tmpfs: vec![wire::TmpfsMount {
                path: "/data".into(),
                size_bytes: 0,
            }],
            secrets: vec![wire::SecretReference {
                secret_id: vec![5; 16],
                name: "password".into(),
            }],
            ..Default::default()
        };
        let spec = spec_of(
            service,
            wire::ImageConfig {
                user: "app".into(),
                ..Default::default()
            },
        )
        .expect("spec");
        assert_eq!(spec.limits.memory_bytes, limits::TASK_MEMORY_BYTES);
        assert_eq!(
            (spec.limits.pids, spec.limits.cpu_millis),
            (limits::TASK_PIDS, None)
        );
        assert_eq!(spec.tmpfs[0].size_bytes, limits::TASK_TMP_BYTES);
        assert_eq!(
            spec.secrets,
            [SecretFile {
                name: "password".into(),
                size: 3
            }]
        );
        assert_eq!((spec.user.as_str(), spec.hostname.as_str()), ("app", "web-1"));
    }

    #[test]
    fn a_host_name_is_one_label() {
        assert_eq!(host_name(&"x".repeat(63), 10_000).len(), 63);
        assert!(host_name(&"x".repeat(63), 10_000).ends_with("x-10000"));
    }
}
