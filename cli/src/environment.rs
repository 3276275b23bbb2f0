//! What the command takes from its surroundings, read once.

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::path::PathBuf;

/// The surroundings of one run.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Folder of this program's configuration: contexts and their keys.
    pub config: PathBuf,
    /// The user's name, for the first operator.
    pub user: String,
    /// Whether results go to a terminal.
    pub stdout_terminal: bool,
    /// Whether progress goes to a terminal that can repaint.
    pub stderr_terminal: bool,
    /// Whether someone can be asked.
    pub stdin_terminal: bool,
}

impl Environment {
    /// Reads the process's environment.
    pub fn of_process() -> Self {
        let home = folder("HOME").unwrap_or_else(|| PathBuf::from("/"));
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == OsStr::new("dumb"));
        Self {
            config: folder("XDG_CONFIG_HOME")
                .unwrap_or_else(|| home.join(".config"))
                .join("bulkhead"),
            user: std::env::var_os("USER")
                .map_or_else(String::new, |user| user.to_string_lossy().into_owned()),
            stdout_terminal: std::io::stdout().is_terminal(),
            stderr_terminal: std::io::stderr().is_terminal() && !dumb,
            stdin_terminal: std::io::stdin().is_terminal(),
        }
    }
}

/// An absolute folder named by a variable. The base-directory specification tells to ignore relative ones.
fn folder(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}
