//! What a task may ask for: every field checked before anything is made of it.

use crate::message::{Refusal, RefusalCode, TaskSpec};
use crate::sandbox::user::User;
use std::collections::BTreeSet;

/// As many as Docker stacks; the kernel's mount options hold them in one page.
const MAX_LAYERS: usize = 127;
/// Arguments and environment together. With the rest of the spec below one message.
const MAX_ARGUMENT_BYTES: usize = 128 * 1024;
const MAX_TMPFS: usize = 16;
const MAX_SECRETS: usize = 64;
const MAX_SECRET_BYTES: u32 = 500 * 1024;
/// Below this not even a static program starts.
const MIN_MEMORY_BYTES: u64 = 4 << 20;
const MAX_GRACE_MS: u64 = 24 * 3_600_000;
/// Places that a task must find as they are.
const RESERVED: [&str; 3] = ["/proc", "/dev", "/run/secrets"];

/// Checks a spec. The first mistake is told.
pub(crate) fn validate(spec: &TaskSpec) -> Result<(), Refusal> {
    let rule = |holds: bool, message: &str| {
        if holds {
            Ok(())
        } else {
            Err(Refusal::new(RefusalCode::Invalid, message))
        }
    };
    rule(
        !spec.layers.is_empty() && spec.layers.len() <= MAX_LAYERS,
        "a task needs 1 to 127 layers",
    )?;

    let variables = spec.env.iter().flat_map(|(name, value)| [name, value]);
    let texts: Vec<&String> = spec.argv.iter().chain(variables).collect();
    let bytes: usize = texts.iter().map(|text| text.len() + 9).sum();
    rule(
        spec.argv.first().is_some_and(|program| !program.is_empty()),
        "there is no command to run",
    )?;
    rule(
        bytes <= MAX_ARGUMENT_BYTES,
        "arguments and environment are over 128 KiB",
    )?;
    rule(
        !texts.iter().any(|text| text.contains('\0')),
        "a zero byte in an argument or variable",
    )?;
    let named = |name: &str| !name.is_empty() && !name.contains('=');
    rule(
        spec.env.iter().all(|(name, _)| named(name)),
        "a variable's name is empty or has a =",
    )?;
    let names: BTreeSet<&String> = spec.env.iter().map(|(name, _)| name).collect();
    rule(names.len() == spec.env.len(), "a variable is given twice")?;

    User::parse(&spec.user)?;
    rule(
        spec.workdir.is_empty() || is_plain(&spec.workdir),
        "the working folder is not an absolute, plain path",
    )?;
    rule(
        !below(&spec.workdir, "/proc"),
        "the working folder cannot be in /proc",
    )?;
    let host = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    let hostname = !spec.hostname.is_empty() && spec.hostname.len() <= 63 && spec.hostname.bytes().all(host);
    rule(hostname, "the host name is not 1 to 63 letters, digits, - or .")?;

    rule(spec.tmpfs.len() <= MAX_TMPFS, "more than 16 tmpfs")?;
    for place in &spec.tmpfs {
        let reserved = RESERVED.iter().any(|name| below(&place.path, name));
        rule(
            is_plain(&place.path) && place.path != "/",
            "a tmpfs needs an absolute, plain path",
        )?;
        rule(!reserved, "a tmpfs cannot be in /proc, /dev or /run/secrets")?;
        rule(
            (4_096..=1 << 36).contains(&place.size_bytes),
            "a tmpfs needs a size from 4 KiB to 64 GiB",
        )?;
    }
    let places: BTreeSet<&str> = spec.tmpfs.iter().map(|place| place.path.as_str()).collect();
    rule(places.len() == spec.tmpfs.len(), "a tmpfs is given twice")?;

    let limits = &spec.limits;
    rule(
        limits.memory_bytes >= MIN_MEMORY_BYTES,
        "the memory limit is below 4 MiB",
    )?;
    rule(
        limits.memory_bytes <= 1 << 48,
        "the memory limit is beyond any machine",
    )?;
    rule(
        (1..=100_000).contains(&limits.pids),
        "the process limit is not from 1 to 100000",
    )?;
    rule(
        limits
            .cpu_millis
            .is_none_or(|millis| (10..=10_000_000).contains(&millis)),
        "the CPU limit is below 0.01",
    )?;
    rule(
        (1..=10_000).contains(&limits.cpu_weight),
        "the CPU weight is not from 1 to 10000",
    )?;
    rule(
        (256 << 10..=1 << 30).contains(&limits.log_bytes),
        "the log's size is not from 256 KiB to 1 GiB",
    )?;
    rule(
        spec.stop_grace_ms <= MAX_GRACE_MS,
        "the grace period is over a day",
    )?;

    rule(spec.secrets.len() <= MAX_SECRETS, "more than 64 secrets")?;
    for secret in &spec.secrets {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let name = &secret.name;
        let valid = (1..=255).contains(&name.len()) && name.bytes().all(plain) && name != "." && name != "..";
        rule(valid, "a secret's name is not 1 to 255 letters, digits, . _ or -")?;
        rule(secret.size <= MAX_SECRET_BYTES, "a secret is over 500 KiB")?;
    }
    let names: BTreeSet<&str> = spec.secrets.iter().map(|secret| secret.name.as_str()).collect();
    rule(names.len() == spec.secrets.len(), "a secret is given twice")
}

/// Absolute, without empty, `.` or `..` parts, not too long.
fn is_plain(path: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    let clean = !path.contains(['\0', '\n']) && path.len() < 4_096;
    path == "/"
        || clean
            && path
                .strip_prefix('/')
                .is_some_and(|rest| rest.split('/').all(part))
}

fn below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DiffId, Limits, SecretFile, TaskId, Tmpfs};

    fn spec() -> TaskSpec {
        TaskSpec {
            task: TaskId::try_from("t".to_owned()).expect("id"),
            epoch: 1,
            layers: vec![DiffId::try_from(format!("sha256:{}", "0".repeat(64))).expect("digest")],
            argv: vec!["/app".into()],
            env: vec![("A".into(), "b".into())],
            user: String::new(),
            workdir: String::new(),
            hostname: "web-1".into(),
            tmpfs: Vec::new(),
            limits: Limits::default(),
            secrets: Vec::new(),
            stop_grace_ms: 10_000,
        }
    }

    fn check(what: &str, change: impl FnOnce(&mut TaskSpec)) {
        let mut spec = spec();
        change(&mut spec);
        assert!(validate(&spec).is_err(), "{what}");
    }

    #[test]
    fn a_usual_spec_is_fine() {
        let mut spec = spec();
        spec.workdir = "/srv/app".into();
        spec.tmpfs = vec![Tmpfs {
            path: "/run".into(),
            size_bytes: 1 << 20,
        }];
        spec.secrets = vec![SecretFile {
            name: "db-password".into(),
            size: 12,
        }];
        assert_eq!(validate(&spec), Ok(()));
    }

    #[test]
    fn mistakes_and_tricks_are_refused() {
        let tmpfs = |path: &str| {
            vec![Tmpfs {
                path: path.into(),
                size_bytes: 1 << 20,
            }]
        };
        let secret = |name: &str| SecretFile {
            name: name.into(),
            size: 1,
        };
        check("no command", |s| s.argv.clear());
        check("empty command", |s| s.argv = vec![String::new()]);
        check("zero byte", |s| s.argv.push("a\0b".into()));
        check("variable with =", |s| s.env.push(("A=B".into(), String::new())));
        check("variable twice", |s| s.env.push(("A".into(), String::new())));
        check("huge environment", |s| {
            s.env.push(("B".into(), "x".repeat(MAX_ARGUMENT_BYTES)))
        });
        check("user over 32 bits", |s| s.user = "4294967296".into());
        check("working folder through a descriptor", |s| {
            s.workdir = "/proc/self/fd/7".into()
        });
        check("relative working folder", |s| s.workdir = "srv".into());
        check("working folder upwards", |s| s.workdir = "/srv/../..".into());
        check("host name", |s| s.hostname = "a b".into());
        for path in [
            "/",
            "tmp",
            "/proc",
            "/proc/sys",
            "/dev",
            "/run/secrets/x",
            "/a/../b",
            "/a//b",
            "/a/",
        ] {
            check(path, |s| s.tmpfs = tmpfs(path));
        }
        check("secret upwards", |s| s.secrets = vec![secret("..")]);
        check("secret elsewhere", |s| s.secrets = vec![secret("a/b")]);
        check("secret twice", |s| s.secrets = vec![secret("a"), secret("a")]);
        check("no memory", |s| s.limits.memory_bytes = 0);
        check("no processes", |s| s.limits.pids = 0);
        check("no layers", |s| s.layers.clear());
    }
}
