//! Checks what an operator asks for, before it becomes part of the state: every mistake at once, each with its field
//! and what to write instead.
//!
//! What the launcher would refuse later is refused here, where the operator still looks. Zero and empty mean the
//! default; defaults are filled in when a task is started, so that a spec keeps saying what was asked for. Values of
//! environment variables are never repeated: one may be what should have been a secret.

use std::collections::BTreeSet;
use std::fmt;

use bulkhead_proto::{limits, wire};
use prost::Message as _;

use crate::scheduler::constraint::{Attribute, Constraint};

/// Mistakes that one answer lists. More are one kind of mistake, made often.
const MISTAKES: usize = 64;
/// What the sandbox bounds, too.
const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 4 << 20..=1 << 48;
const CPU_MILLIS: std::ops::RangeInclusive<u64> = 10..=10_000_000;
const PIDS: std::ops::RangeInclusive<u32> = 1..=100_000;
const TMPFS_BYTES: std::ops::RangeInclusive<u64> = 4_096..=1 << 36;
const TMPFS: usize = 16;
const PATH_BYTES: usize = 4_096;
/// The longest delay, grace or monitor period.
const DAY_MS: u64 = 86_400_000;
/// Where a task's own mounts are.
const RESERVED: [&str; 3] = ["/proc", "/dev", "/run/secrets"];

/// One thing that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Path of the field, as `ports[1].host`.
    pub field: String,
    /// What is wrong.
    pub what: String,
    /// What to do instead.
    pub hint: &'static str,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.field, self.what, self.hint)
    }
}

/// Checks an object's name: a DNS label (RFC 1035 §2.3.1), since it becomes part of host names.
///
/// # Errors
/// The mistake.
pub fn name(field: &str, text: &str) -> Result<(), Mistake> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = text.len() <= limits::NAME_CHARS
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text.chars().all(inner);
    if good {
        return Ok(());
    }
    Err(Mistake {
        field: field.to_owned(),
        what: format!("{} is not a name", quoted(text)),
        hint: "use a-z, 0-9 and '-', start with a letter, end without '-', at most 63 characters",
    })
}

/// Checks the labels of one object.
pub fn labels(field: &str, labels: &[wire::Label]) -> Vec<Mistake> {
    let mut check = Check::default();
    check.labels(field, labels);
    check.0
}

/// Checks a spec. References to images and secrets are for the caller to resolve.
///
/// # Errors
/// Every mistake, up to a bound.
pub fn spec(spec: &wire::ServiceSpec) -> Result<(), Vec<Mistake>> {
    let mut check = Check::default();
    check.0.extend(name("name", &spec.name).err());
    check.labels("labels", &spec.labels);
    check.at_most("replicas", u64::from(spec.replicas), u64::from(limits::REPLICAS));
    check.image(spec);
    check.texts("command", &spec.command);
    check.texts("arguments", &spec.arguments);
    check.environment(&spec.environment);
    check.user(&spec.user);
    check.tmpfs(&spec.tmpfs);
    check.secrets(&spec.secrets);
    check.ports(&spec.ports);
    check.constraints(spec);
    check.resources(spec);
    check.policies(spec);
    let bytes = spec.encoded_len();
    check.rule(
        bytes <= limits::SPEC_BYTES,
        "spec",
        || format!("{bytes} bytes; the limit is {}", limits::SPEC_BYTES),
        "put what is large into the image or a secret",
    );
    check.0.truncate(MISTAKES);
    if check.0.is_empty() { Ok(()) } else { Err(check.0) }
}

#[derive(Default)]
struct Check(Vec<Mistake>);

impl Check {
    fn rule(&mut self, holds: bool, field: &str, what: impl FnOnce() -> String, hint: &'static str) {
        if !holds && self.0.len() < MISTAKES {
            self.0.push(Mistake {
                field: field.to_owned(),
                what: what(),
                hint,
            });
        }
    }

    fn at_most(&mut self, field: &str, value: u64, limit: u64) {
        self.rule(
            value <= limit,
            field,
            || format!("{value}; the limit is {limit}"),
            "ask for less",
        );
    }

    fn labels(&mut self, field: &str, labels: &[wire::Label]) {
        self.at_most(
            &format!("{field}: entries"),
            count(labels),
            count_of(limits::LABELS),
        );
        let mut keys = BTreeSet::new();
        for (number, label) in labels.iter().enumerate() {
            let field = format!("{field}[{number}]");
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
            let length = label.key.len().max(label.value.chars().count());
            self.rule(
                !label.key.is_empty() && label.key.chars().all(plain),
                &field,
                || format!("{} is not a label's key", quoted(&label.key)),
                "use letters, digits, '.', '_', '-' and '/'",
            );
            self.at_most(&field, count_of(length), count_of(limits::LABEL_CHARS));
            self.rule(
                !label.value.contains(char::is_control),
                &field,
                || "the value has a control character".to_owned(),
                "write it without",
            );
            self.rule(
                keys.insert(&label.key),
                &field,
                || format!("{} is there twice", quoted(&label.key)),
                "keep one",
            );
        }
    }

    fn image(&mut self, spec: &wire::ServiceSpec) {
        let characters = spec.image_name.chars().count();
        self.rule(
            characters > 0
                && !spec
                    .image_name
                    .contains(|c: char| c.is_control() || c.is_whitespace()),
            "image",
            || format!("{} is not the name of an image", quoted(&spec.image_name)),
            "write NAME:TAG, as `image ls` shows it",
        );
        self.at_most(
            "image",
            count_of(characters),
            count_of(limits::IMAGE_REFERENCE_CHARS),
        );
    }

    fn texts(&mut self, field: &str, texts: &[String]) {
        self.at_most(
            &format!("{field}: entries"),
            count(texts),
            count_of(limits::ARGUMENTS),
        );
        for (number, text) in texts.iter().enumerate() {
            let field = format!("{field}[{number}]");
            self.at_most(&field, count_of(text.len()), count_of(limits::ARGUMENT_BYTES));
            self.no_zero_byte(&field, text);
        }
        self.rule(
            texts.first().is_none_or(|first| !first.is_empty()) || field != "command",
            field,
            || "the program is empty".to_owned(),
            "name a program, or none for the image's own",
        );
    }

    fn no_zero_byte(&mut self, field: &str, text: &str) {
        self.rule(
            !text.contains('\0'),
            field,
            || "it has a zero byte".to_owned(),
            "the kernel takes none; remove it",
        );
    }

    fn environment(&mut self, entries: &[String]) {
        self.at_most(
            "environment: entries",
            count(entries),
            count_of(limits::ENVIRONMENT_ENTRIES),
        );
        let mut names = BTreeSet::new();
        for (number, entry) in entries.iter().enumerate() {
            let field = format!("environment[{number}]");
            let name = entry.split_once('=').map(|(name, _)| name).unwrap_or_default();
            let good = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
            self.rule(
                good,
                &field,
                || "it is not NAME=value".to_owned(),
                "write NAME=value; for what must stay secret use a secret",
            );
            self.at_most(
                &field,
                count_of(entry.len()),
                count_of(limits::ENVIRONMENT_ENTRY_BYTES),
            );
            self.no_zero_byte(&field, entry);
            self.rule(
                !good || names.insert(name),
                &field,
                || format!("{} is there twice", quoted(name)),
                "keep one",
            );
        }
    }

    /// `user` or `user:group`, each an id or a name of the image.
    fn user(&mut self, user: &str) {
        let part = |part: &str| {
            let digits = part.bytes().all(|b| b.is_ascii_digit());
            let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            (1..=limits::NAME_CHARS).contains(&part.len())
                && part.chars().all(plain)
                && (!digits || part.parse::<u16>().is_ok_and(|id| id < u16::MAX))
        };
        let good = user.is_empty()
            || match user.split_once(':') {
                Some((user, group)) => part(user) && part(group),
                None => part(user),
            };
        self.rule(
            good,
            "user",
            || format!("{} is no user", quoted(user)),
            "write USER or USER:GROUP, each a name of the image or an id from 0 to 65534",
        );
    }

    fn tmpfs(&mut self, mounts: &[wire::TmpfsMount]) {
        self.at_most("tmpfs: entries", count(mounts), count_of(TMPFS));
        let mut paths = BTreeSet::new();
        for (number, mount) in mounts.iter().enumerate() {
            let field = format!("tmpfs[{number}]");
            let path = &mount.path;
            self.rule(
                is_plain_path(path),
                &field,
                || format!("{} is not a plain absolute path", quoted(path)),
                "write it from '/', without '.', '..' or '//'",
            );
            let reserved = RESERVED.iter().any(|folder| is_within(path, folder));
            self.rule(
                !reserved,
                &field,
                || format!("{} is the sandbox's own place", quoted(path)),
                "choose a path outside of /proc, /dev and /run/secrets",
            );
            self.rule(
                mount.size_bytes == 0 || TMPFS_BYTES.contains(&mount.size_bytes),
                &field,
                || format!("a size of {} bytes", mount.size_bytes),
                "ask for 4 KiB to 64 GiB",
            );
            self.rule(
                paths.insert(path),
                &field,
                || format!("{} is there twice", quoted(path)),
                "keep one",
            );
        }
    }

    fn secrets(&mut self, secrets: &[wire::SecretReference]) {
        self.at_most(
            "secrets: entries",
            count(secrets),
            count_of(limits::SPEC_LIST_ENTRIES),
        );
        let mut names = BTreeSet::new();
        for (number, secret) in secrets.iter().enumerate() {
            let field = format!("secrets[{number}]");
            let name = &secret.name;
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            let good = (1..=limits::LABEL_CHARS).contains(&name.len())
                && name.bytes().all(plain)
                && name != "."
                && name != "..";
            self.rule(
                good,
                &field,
                || format!("{} is not a file name for a secret", quoted(name)),
                "use letters, digits, '.', '_' and '-'",
            );
            self.rule(
                names.insert(name),
                &field,
                || format!("two secrets would be /run/secrets/{name}"),
                "give one of them another name",
            );
        }
    }

    fn ports(&mut self, ports: &[wire::PublishedPort]) {
        self.at_most(
            "ports: entries",
            count(ports),
            count_of(limits::SPEC_LIST_ENTRIES),
        );
        let mut hosts = BTreeSet::new();
        for (number, port) in ports.iter().enumerate() {
            for (side, value) in [("host", port.host), ("target", port.target)] {
                self.rule(
                    (1..=u32::from(u16::MAX)).contains(&value),
                    &format!("ports[{number}].{side}"),
                    || format!("{value} is not a port"),
                    "use 1 to 65535",
                );
            }
            self.rule(
                hosts.insert(port.host),
                &format!("ports[{number}].host"),
                || format!("the host port {} is there twice", port.host),
                "publish each host port once",
            );
        }
    }

    fn constraints(&mut self, spec: &wire::ServiceSpec) {
        self.at_most(
            "constraints: entries",
            count(&spec.constraints),
            count_of(limits::SPEC_LIST_ENTRIES),
        );
        for (number, constraint) in spec.constraints.iter().enumerate() {
            let field = format!("constraints[{number}]");
            match Constraint::try_from(constraint) {
                Ok(parsed) => self.rule(
                    parsed.attribute != Attribute::Hostname || spec.secrets.is_empty(),
                    &field,
                    || "a node's host name is its own word and cannot place a secret".to_owned(),
                    "use node.id or node.labels.<key>",
                ),
                Err(error) => self.rule(
                    false,
                    &field,
                    || error.to_string(),
                    "write KEY==VALUE or KEY!=VALUE",
                ),
            }
        }
    }

    fn resources(&mut self, spec: &wire::ServiceSpec) {
        let (reserved, limit) = (
            spec.reservation.unwrap_or_default(),
            spec.limit.unwrap_or_default(),
        );
        for (of, resources) in [("reservation", &reserved), ("limit", &limit)] {
            self.rule(
                resources.cpu_millis == 0 || CPU_MILLIS.contains(&resources.cpu_millis),
                &format!("{of}.cpu"),
                || format!("{} thousandths of a processor", resources.cpu_millis),
                "ask for 0.01 to 10000 processors",
            );
            self.rule(
                resources.memory_bytes == 0 || MEMORY_BYTES.contains(&resources.memory_bytes),
                &format!("{of}.memory"),
                || format!("{} bytes", resources.memory_bytes),
                "ask for 4 MiB or more",
            );
        }
        self.rule(
            limit.pids == 0 || PIDS.contains(&limit.pids),
            "limit.pids",
            || format!("{} processes", limit.pids),
            "allow 1 to 100000",
        );
        self.rule(
            reserved.pids == 0,
            "reservation.pids",
            || "processes cannot be reserved".to_owned(),
            "set limit.pids",
        );
        for (what, reserved, limit) in [
            ("cpu", reserved.cpu_millis, limit.cpu_millis),
            ("memory", reserved.memory_bytes, limit.memory_bytes),
        ] {
            self.rule(
                limit == 0 || reserved <= limit,
                &format!("limit.{what}"),
                || format!("the limit {limit} is below the reservation {reserved}"),
                "a task may use at least what is reserved for it",
            );
        }
    }

    fn policies(&mut self, spec: &wire::ServiceSpec) {
        let restart = spec.restart.unwrap_or_default();
        let update = spec.update.unwrap_or_default();
        self.rule(
            wire::RestartCondition::try_from(restart.condition).is_ok(),
            "restart.condition",
            || format!("{} is no condition", restart.condition),
            "use none, on-failure or any",
        );
        self.at_most("restart.delay", restart.delay_ms, DAY_MS);
        self.at_most("update.monitor", update.monitor_ms, DAY_MS);
        self.at_most(
            "update.parallelism",
            update.parallelism.into(),
            limits::REPLICAS.into(),
        );
        self.at_most("stop_grace", spec.stop_grace_ms, DAY_MS);
    }
}

fn count<T>(list: &[T]) -> u64 {
    count_of(list.len())
}

fn count_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// What came, short and without control characters: it may end on a terminal.
fn quoted(text: &str) -> String {
    let shown: String = text.chars().take(80).collect();
    format!("'{}'", shown.escape_debug())
}

fn is_plain_path(path: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    path.len() < PATH_BYTES
        && !path.contains(char::is_control)
        && path
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(part))
}

fn is_within(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests;
