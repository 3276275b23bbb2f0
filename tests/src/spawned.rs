//! A program that `dev` does not run: one that waits to join, or a second cluster's manager.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use crate::lab::Lab;
use crate::wait::eventually;

/// A user that nothing else of these tests is.
const USER: u32 = 0x6fff_ef00;

/// A manager that was started by hand; it ends with the value.
#[derive(Debug)]
pub struct Spawned {
    child: Mutex<Child>,
    data: PathBuf,
}

impl Spawned {
    /// Starts a manager that waits on its local socket until it is told what to do.
    pub fn manager(lab: &Lab, name: &str) -> Self {
        let data = lab.folder().join(name);
        std::fs::create_dir(&data).expect("a new folder");
        std::os::unix::fs::chown(&data, Some(USER), Some(USER)).expect("root may");
        let child = Mutex::new(begin(lab, &data));
        let spawned = Self { child, data };
        spawned.until_listening();
        spawned
    }

    /// Kills it, and starts it again in its folder.
    pub fn restart(&self, lab: &Lab) {
        let mut child = self.child.lock().expect("its own");
        child.kill().expect("it runs");
        child.wait().expect("a child");
        std::fs::remove_file(self.socket()).expect("it listened");
        *child = begin(lab, &self.data);
        self.until_listening();
    }

    fn until_listening(&self) {
        eventually("it waits on its socket", || {
            self.socket().exists().then_some(()).ok_or_else(|| self.log())
        });
    }

    /// Its local socket.
    pub fn socket(&self) -> PathBuf {
        self.data.join("manager.sock")
    }

    /// All that it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_of(&self.data)).expect("its log")
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may have ended by itself; it is waited for in any case.
        let Ok(child) = self.child.get_mut() else { return };
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn begin(lab: &Lab, data: &Path) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log_of(data))
        .expect("a file of its own");
    let mut command: Command = lab.program("bulkhead-manager");
    command
        .arg("--data")
        .arg(data)
        .uid(USER)
        .gid(USER)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a descriptor"))
        .stderr(log)
        .spawn()
        .expect("it starts")
}

fn log_of(data: &Path) -> PathBuf {
    data.with_extension("log")
}
