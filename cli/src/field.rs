//! The small grammars of a service's flags: names, labels, ports, constraints, tmpfs and environment.
//!
//! Managers check again; a mistake found here is found while the operator still looks at the line.

use bulkhead_proto::limits;
use bulkhead_proto::wire::{Constraint, Label, PublishedPort, TmpfsMount};

use crate::quantity::size;
use crate::refusal::{Code, Refusal};

/// Bytes of an environment file: every entry at its limit would be an accident, not a configuration.
pub(crate) const ENVIRONMENT_FILE_BYTES: usize = 1 << 20;

fn refuse(place: &str, reason: String, help: &str) -> Refusal {
    Refusal::new(Code::BadField, place, reason, help)
}

/// Checks the name of a service or secret: a DNS label (RFC 1035 §2.3.1), since it becomes a host name.
pub(crate) fn object_name(text: &str) -> Result<String, Refusal> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = text.len() <= limits::NAME_CHARS
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.chars().all(inner);
    if good {
        return Ok(text.to_owned());
    }
    let reason = format!("'{text}' is not a name");
    Err(refuse(
        "name",
        reason,
        "use a-z, 0-9 and '-', start with a letter, end without '-', at most 63",
    ))
}

/// Reads `key=value`; `key` alone has an empty value.
pub(crate) fn label(text: &str) -> Result<Label, Refusal> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if key.is_empty() || !key.chars().all(plain) {
        let reason = format!("'{key}' is not a label's key");
        return Err(refuse(
            "label",
            reason,
            "write key=value, the key of letters, digits, '.', '_', '-' and '/'",
        ));
    }
    if key.len() > limits::LABEL_CHARS || value.chars().count() > limits::LABEL_CHARS {
        let reason = format!(
            "key and value have at most {} characters each",
            limits::LABEL_CHARS
        );
        return Err(Refusal::new(Code::OverLimit, "label", reason, "shorten it"));
    }
    Ok(Label {
        key: key.to_owned(),
        value: value.to_owned(),
    })
}

/// [`label`] as clap wants it.
pub(crate) fn label_value(text: &str) -> Result<Label, String> {
    label(text).map_err(|e| e.one_line())
}

/// Reads `8080:80`, `80` (the same on both sides) or `published=8080,target=80`.
pub(crate) fn published_port(text: &str) -> Result<PublishedPort, Refusal> {
    let help = "write HOST:TARGET, like 8080:80, or published=8080,target=80";
    let port = |number: &str| match number.parse::<u16>() {
        Ok(port) if port > 0 && number.bytes().all(|b| b.is_ascii_digit()) => Ok(u32::from(port)),
        _ => Err(refuse(
            "publish",
            format!("'{number}' is not a port from 1 to 65535"),
            help,
        )),
    };
    if !text.contains('=') {
        let text = text.strip_suffix("/tcp").unwrap_or(text);
        let (host, target) = text.split_once(':').unwrap_or((text, text));
        return Ok(PublishedPort {
            host: port(host)?,
            target: port(target)?,
        });
    }
    let (mut host, mut target) = (None, None);
    for part in text.split(',') {
        let slot = match part.split_once('=') {
            Some(("published", value)) => (&mut host, value),
            Some(("target", value)) => (&mut target, value),
            Some(("mode", "host") | ("protocol", "tcp")) => continue,
            _ => return Err(refuse("publish", format!("'{part}' is not understood"), help)),
        };
        if slot.0.replace(port(slot.1)?).is_some() {
            return Err(refuse(
                "publish",
                format!("'{part}' says again what was said"),
                help,
            ));
        }
    }
    let target = target.ok_or_else(|| refuse("publish", "target is missing".into(), help))?;
    Ok(PublishedPort {
        host: host.unwrap_or(target),
        target,
    })
}

/// Reads `node.labels.zone==a` or `node.role!=manager`.
pub(crate) fn constraint(text: &str) -> Result<Constraint, Refusal> {
    const KEYS: [&str; 3] = ["node.id", "node.hostname", "node.role"];
    let help = "write KEY==VALUE or KEY!=VALUE; keys: node.id, node.hostname, node.role, node.labels.NAME";
    let (at, equal) = match (text.find("=="), text.find("!=")) {
        (Some(at), None) => (at, true),
        (None, Some(at)) => (at, false),
        (Some(equal), Some(unequal)) => (equal.min(unequal), equal < unequal),
        (None, None) => return Err(refuse("constraint", format!("'{text}' compares nothing"), help)),
    };
    let (key, value) = (text[..at].trim(), text[at + 2..].trim());
    let labelled = key
        .strip_prefix("node.labels.")
        .is_some_and(|name| !name.is_empty());
    if !labelled && !KEYS.contains(&key) {
        return Err(refuse("constraint", format!("'{key}' is not a key"), help));
    }
    if value.is_empty() || value.chars().count() > limits::LABEL_CHARS {
        return Err(refuse(
            "constraint",
            format!("'{text}' has no value, or one that is too long"),
            help,
        ));
    }
    Ok(Constraint {
        key: key.to_owned(),
        equal,
        value: value.to_owned(),
    })
}

/// Reads `/path` or `/path:size=64m`.
pub(crate) fn tmpfs(text: &str) -> Result<TmpfsMount, Refusal> {
    let help = "write an absolute path, like /cache or /cache:size=64m";
    let (path, option) = text.split_once(':').unwrap_or((text, ""));
    let plain = path.len() > 1
        && path.starts_with('/')
        && path[1..].split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.contains('\0');
    if !plain {
        return Err(refuse(
            "tmpfs",
            format!("'{path}' is not a plain absolute path"),
            help,
        ));
    }
    let size_bytes = match option {
        "" => limits::TASK_TMP_BYTES,
        option => match option.strip_prefix("size=") {
            Some(text) => size(text)?,
            None => return Err(refuse("tmpfs", format!("'{option}' is not an option"), help)),
        },
    };
    Ok(TmpfsMount {
        path: path.to_owned(),
        size_bytes,
    })
}

/// Checks `NAME=value`. A bare name is refused: what it takes from the operator's own environment is a leak.
pub(crate) fn environment_entry(text: &str) -> Result<String, Refusal> {
    let help = "write NAME=value; for what must stay secret use a secret";
    let name = text.split_once('=').map(|(name, _)| name).unwrap_or_default();
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !first
        || !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
        || text.contains('\0')
    {
        // The value may be what the operator should not have typed; it is not repeated.
        return Err(refuse("env", "an entry is not NAME=value".into(), help));
    }
    if text.len() > limits::ENVIRONMENT_ENTRY_BYTES {
        let reason = format!("'{name}' is over {} bytes", limits::ENVIRONMENT_ENTRY_BYTES);
        return Err(Refusal::new(
            Code::OverLimit,
            "env",
            reason,
            "pass a file in the image, or a secret",
        ));
    }
    Ok(text.to_owned())
}

/// Reads an environment file: one `NAME=value` on a line, `#` comments, values taken as they stand.
pub(crate) fn environment_file(content: &[u8]) -> Result<Vec<String>, Refusal> {
    if content.len() > ENVIRONMENT_FILE_BYTES {
        let reason = format!("the file is over {ENVIRONMENT_FILE_BYTES} bytes");
        return Err(Refusal::new(
            Code::OverLimit,
            "env-file",
            reason,
            "is it the right file?",
        ));
    }
    let text = std::str::from_utf8(content).map_err(|_| {
        refuse(
            "env-file",
            "the file is not UTF-8".into(),
            "is it the right file?",
        )
    })?;
    let mut entries = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let place = format!("env-file, line {}", number + 1);
        let entry = environment_entry(line)
            .map_err(|e| Refusal::new(e.code(), place.clone(), e.one_line(), "correct that line"))?;
        entries.push(entry);
    }
    if entries.len() > limits::ENVIRONMENT_ENTRIES {
        let reason = format!(
            "{} entries; the limit is {}",
            entries.len(),
            limits::ENVIRONMENT_ENTRIES
        );
        return Err(Refusal::new(Code::OverLimit, "env-file", reason, "pass fewer"));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_a_short_and_a_long_form() {
        for (text, host, target) in [
            ("8080:80", 8080, 80),
            ("80", 80, 80),
            ("8080:80/tcp", 8080, 80),
            ("published=8080,target=80,mode=host", 8080, 80),
            ("target=80", 80, 80),
        ] {
            assert_eq!(published_port(text), Ok(PublishedPort { host, target }), "{text}");
        }
        for text in [
            "",
            "0:80",
            "80:0",
            "65536:1",
            "+80",
            "1:2:3",
            "80/udp",
            "published=1",
            "target=1,target=2",
        ] {
            assert_eq!(
                published_port(text).map_err(|e| e.code()),
                Err(Code::BadField),
                "{text}"
            );
        }
    }

    #[test]
    fn constraints_compare_known_keys() {
        for (text, key, equal, value) in [
            ("node.role==worker", "node.role", true, "worker"),
            ("node.labels.zone != a", "node.labels.zone", false, "a"),
            ("node.labels.x==a!=b", "node.labels.x", true, "a!=b"),
        ] {
            let want = Constraint {
                key: key.into(),
                equal,
                value: value.into(),
            };
            assert_eq!(constraint(text), Ok(want), "{text}");
        }
        for text in [
            "",
            "node.role",
            "node.role=worker",
            "node.labels.==a",
            "node.zone==a",
            "node.role==",
        ] {
            assert!(constraint(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_dns_labels() {
        for good in ["web", "db-password", "a1"] {
            assert_eq!(object_name(good), Ok(good.to_owned()));
        }
        let long = "a".repeat(64);
        for bad in ["", "Web", "-a", "a-", "1a", "a_b", "a.b", "../x", long.as_str()] {
            assert!(object_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tmpfs_paths_are_plain_and_absolute() {
        let want = TmpfsMount {
            path: "/cache".into(),
            size_bytes: 1 << 20,
        };
        assert_eq!(tmpfs("/cache:size=1m"), Ok(want));
        assert_eq!(tmpfs("/var/x").map(|m| m.size_bytes), Ok(limits::TASK_TMP_BYTES));
        for bad in [
            "",
            "/",
            "cache",
            "/a/../b",
            "/a//b",
            "/a/",
            "/a:mode=1",
            "/a:size=x",
        ] {
            assert!(tmpfs(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_refused_variable_is_not_repeated() {
        let refusal = environment_entry("1hunter2=x").expect_err("names do not start with a digit");
        assert!(!refusal.to_string().contains("hunter2"));
        assert!(environment_entry("HOME").is_err());
        assert_eq!(environment_entry("A="), Ok("A=".to_owned()));
    }

    #[test]
    fn an_environment_file_names_the_wrong_line() {
        let entries = environment_file(b"# c\n\nA=1\n  B = \n").expect_err("'B ' is not a name");
        assert!(entries.to_string().contains("line 4"), "{entries}");
        assert_eq!(
            environment_file(b"A=1 # kept\nB=\"q\"\n"),
            Ok(vec!["A=1 # kept".into(), "B=\"q\"".into()])
        );
        assert!(environment_file(&vec![b'#'; ENVIRONMENT_FILE_BYTES + 1]).is_err());
    }

    #[test]
    fn labels_have_keys() {
        assert_eq!(
            label("a=b=c"),
            Ok(Label {
                key: "a".into(),
                value: "b=c".into()
            })
        );
        assert!(label("=b").is_err() && label("a b=c").is_err());
        assert_eq!(
            label(&format!("a={}", "x".repeat(256))).map_err(|e| e.code()),
            Err(Code::OverLimit)
        );
    }
}
