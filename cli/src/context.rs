//! Contexts: the clusters that this operator can command, each with its key and the managers' addresses.
//!
//! A context is a folder `contexts/NAME` (0700) with the one key file and a list of addresses; the file `current` names
//! the context that is meant where none is said. Keys never leave their folder but by `operator issue`.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_identity::{Credentials, Identity, Key};
use bulkhead_proto::ClusterId;
use bulkhead_proto::wire::EnrolResponse;

use crate::key;
use crate::output::Progress;
use crate::refusal::{Code, Refusal};

/// The context that a command makes where none is named.
pub(crate) const DEFAULT: &str = "default";
/// Addresses that a context keeps; a cluster has far fewer managers.
const ADDRESSES: usize = 64;

/// Checks a context's name: it becomes the name of a folder.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if text.len() <= 63 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(inner) {
        return Ok(text.to_owned());
    }
    Err("use letters, digits, '.', '_' and '-', at most 63, the first a letter or digit".into())
}

/// The folder of all contexts.
#[derive(Debug, Clone)]
pub(crate) struct Contexts {
    root: PathBuf,
}

/// One context.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Its name.
    pub(crate) name: String,
    folder: PathBuf,
}

impl Contexts {
    /// The contexts under a configuration folder, which need not exist.
    pub(crate) fn under(config: &Path) -> Self {
        Self {
            root: config.to_owned(),
        }
    }

    /// Every context's name, in order.
    pub(crate) fn names(&self) -> Result<Vec<String>, Refusal> {
        let folder = self.root.join("contexts");
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(unreadable(&folder, &e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|entry| name(entry).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// The name that `use` chose.
    pub(crate) fn current(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.root.join("current")).ok()?;
        name(text.trim()).ok()
    }

    /// The context that is meant: the one named, or the current one.
    pub(crate) fn find(&self, named: Option<&str>) -> Result<Context, Refusal> {
        let chosen = named.map(str::to_owned).or_else(|| self.current());
        let chosen = chosen.ok_or_else(|| {
            let help = "'bulkhead dev up' makes a local cluster, 'bulkhead cluster init' a real one, \
                        'bulkhead context use' chooses";
            Refusal::new(
                Code::NoContext,
                "context",
                "none is chosen and none is named",
                help,
            )
        })?;
        let context = self.at(&chosen);
        if context.folder.is_dir() {
            return Ok(context);
        }
        let reason = format!("there is no context '{chosen}'");
        let names = self.names()?;
        let help = match names.as_slice() {
            [] => "there is none at all: 'bulkhead dev up' or 'bulkhead cluster init' makes one".into(),
            names => format!("there are: {}", names.join(", ")),
        };
        Err(Refusal::new(Code::NoContext, "context", reason, help))
    }

    /// Makes the folder of a new context.
    pub(crate) fn create(&self, name: &str) -> Result<Context, Refusal> {
        let context = self.at(name);
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700);
        let parent = self.root.join("contexts");
        builder
            .recursive(true)
            .create(&parent)
            .map_err(|e| unwritable(&parent, &e))?;
        builder.recursive(false).create(&context.folder).map_err(|e| {
            if e.kind() == std::io::ErrorKind::AlreadyExists {
                let help = format!("name another with --context, or 'bulkhead context rm {name}'");
                Refusal::new(
                    Code::ContextExists,
                    "context",
                    format!("there is a '{name}'"),
                    help,
                )
            } else {
                unwritable(&context.folder, &e)
            }
        })?;
        Ok(context)
    }

    /// Makes a context the current one.
    pub(crate) fn select(&self, name: &str) -> Result<(), Refusal> {
        let context = self.find(Some(name))?;
        replace(&self.root, "current", format!("{}\n", context.name).as_bytes())
    }

    /// Removes a context, its key with it.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Refusal> {
        let context = self.find(Some(name))?;
        std::fs::remove_dir_all(&context.folder).map_err(|e| unwritable(&context.folder, &e))?;
        if self.current().as_deref() == Some(name) {
            let current = self.root.join("current");
            std::fs::remove_file(&current).map_err(|e| unwritable(&current, &e))?;
        }
        Ok(())
    }

    fn at(&self, name: &str) -> Context {
        Context {
            name: name.to_owned(),
            folder: self.root.join("contexts").join(name),
        }
    }
}

impl Context {
    fn key_file(&self) -> PathBuf {
        self.folder.join("key")
    }

    /// The managers' addresses, the one that answered last first.
    pub(crate) fn managers(&self) -> Result<Vec<String>, Refusal> {
        let path = self.folder.join("managers");
        let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
        Ok(text
            .lines()
            .filter(|line| !line.is_empty())
            .take(ADDRESSES)
            .map(str::to_owned)
            .collect())
    }

    /// Who the operator is in this cluster; refused where the certificate's time is over.
    pub(crate) fn identity(&self) -> Result<Identity, Refusal> {
        key::load(&self.key_file())
    }

    /// The cluster, and when the operator's certificate ends, in milliseconds.
    pub(crate) fn subject(&self) -> Result<(ClusterId, i64), Refusal> {
        key::subject(&self.key_file())
    }

    /// Keeps a key with the certificate that the cluster gave for it.
    pub(crate) fn keep(&self, key: Key, answer: &EnrolResponse) -> Result<(), Refusal> {
        self.keep_managers(&key::save(&self.key_file(), key, answer)?)
    }

    /// Takes up other credentials of the same operator, and gives them.
    pub(crate) fn replace(&self, credentials: Credentials) -> Result<Arc<Credentials>, Refusal> {
        key::replace(&self.key_file(), credentials)
    }

    /// Takes over another operator's key file.
    pub(crate) fn import(&self, from: &Path) -> Result<(), Refusal> {
        self.keep_managers(&key::copy(from, &self.key_file())?)
    }

    /// Becomes an operator with a ticket.
    pub(crate) async fn enrol(
        &self,
        ticket: &str,
        addresses: Vec<String>,
        name: String,
        progress: &mut Progress<'_>,
    ) -> Result<(), Refusal> {
        self.keep_managers(&key::enrol(&self.key_file(), ticket, addresses, name, progress).await?)
    }

    /// Keeps the managers' addresses.
    pub(crate) fn keep_managers(&self, addresses: &[String]) -> Result<(), Refusal> {
        let lines: String = addresses
            .iter()
            .take(ADDRESSES)
            .map(|address| format!("{address}\n"))
            .collect();
        replace(&self.folder, "managers", lines.as_bytes())
    }
}

/// The list to keep: who answered first, then the cluster's members, then nobody else. `None`: as it is.
pub(crate) fn reorder(kept: &[String], answered: Option<usize>, members: &[String]) -> Option<Vec<String>> {
    let first = kept.get(answered?)?;
    let rest = if members.is_empty() { kept } else { members };
    let mut list = vec![first.clone()];
    list.extend(
        rest.iter()
            .filter(|address| !address.is_empty() && *address != first)
            .cloned(),
    );
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|address| seen.insert(address.clone()));
    (list != kept).then_some(list)
}

/// Replaces a file whole, readable to its owner only.
fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<(), Refusal> {
    let path = folder.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o600))?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().map_err(|e| unwritable(&path, &e))
}

fn unreadable(path: &Path, e: &std::io::Error) -> Refusal {
    let place = path.display().to_string();
    Refusal::new(
        Code::Unreadable,
        place,
        e.to_string(),
        "check the folder's owner and mode",
    )
}

fn unwritable(path: &Path, e: &std::io::Error) -> Refusal {
    let place = path.display().to_string();
    Refusal::new(
        Code::Unwritable,
        place,
        e.to_string(),
        "check the folder's owner and mode",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_made_chosen_and_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let contexts = Contexts::under(&folder.path().join("bulkhead"));
        assert_eq!(
            contexts.find(None).map(|_| ()).map_err(|e| e.code()),
            Err(Code::NoContext)
        );
        let made = contexts.create("a").expect("a new context");
        let mode = std::fs::metadata(&made.folder)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(
            contexts.create("a").map(|_| ()).map_err(|e| e.code()),
            Err(Code::ContextExists)
        );
        contexts.select("a").expect("it is there");
        made.keep_managers(&["127.0.0.1:1".into()])
            .expect("its folder is writable");
        let found = contexts.find(None).expect("the current one");
        assert_eq!(found.managers().expect("it was kept"), ["127.0.0.1:1"]);
        assert_eq!(contexts.select("b").map_err(|e| e.code()), Err(Code::NoContext));
        contexts.remove("a").expect("it is there");
        assert_eq!(contexts.current(), None);
        assert!(contexts.names().expect("readable").is_empty());
    }

    #[test]
    fn a_name_cannot_leave_the_folder() {
        for bad in ["", ".", "..", "../x", "a/b", "-x", ".hidden"] {
            assert!(name(bad).is_err(), "{bad}");
        }
        assert!(name("prod-1.eu").is_ok());
    }

    #[test]
    fn who_answered_comes_first_and_who_left_goes() {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (kept, answered, members, want) in [
            ("a b c", Some(1), "a b d", Some("b a d")),
            ("a b", Some(0), "a b", None),
            ("a b", None, "c", None),
            ("a", Some(0), "", None),
            ("a", Some(0), "b b", Some("a b")),
        ] {
            assert_eq!(
                reorder(&list(kept), answered, &list(members)),
                want.map(list),
                "{kept} {members}"
            );
        }
    }
}
