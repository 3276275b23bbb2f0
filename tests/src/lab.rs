//! A cluster of real programs, made and removed by `bulkhead dev`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::answer::Answer;
use crate::left::{self, Leftovers};
use crate::place::Place;
use crate::wait::eventually;

/// One answer of a task's web server.
const ANSWER: Duration = Duration::from_secs(5);
/// Lines of each log that a failed test shows.
const LOG_LINES: usize = 25;

/// The folder of the programs, which `make test` builds before the tests run; `BULKHEAD_BIN` names another.
pub fn programs() -> PathBuf {
    let folder = std::env::var_os("BULKHEAD_BIN")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            // target/TRIPLE/debug/deps/test-program
            let test = std::env::current_exe().expect("a test has a path");
            test.ancestors().nth(2).expect("two folders up").to_owned()
        });
    for name in [
        "bulkhead",
        "bulkhead-manager",
        "bulkhead-worker",
        "bulkhead-launcher",
        "bulkhead-probe",
    ] {
        let hint = "run: cargo build --workspace --bins";
        assert!(folder.join(name).exists(), "{name} is not built; {hint}");
    }
    folder
}

/// A running cluster; dropping it ends it, and fails if anything of it is left.
#[derive(Debug)]
pub struct Lab {
    place: Place,
}

impl Lab {
    /// Makes a cluster and waits until its nodes are ready.
    pub fn up(managers: u8, workers: u8) -> Self {
        let lab = Self { place: Place::take() };
        lab.ok(&format!("dev up --managers {managers} --workers {workers}"));
        eventually("workers are ready", || {
            let ready = lab.ok("node ls -q --filter role=worker --filter state=ready");
            let count = ready.lines().count();
            (count == usize::from(workers))
                .then_some(())
                .ok_or(format!("{count} are"))
        });
        lab
    }

    /// As [`Lab::up`], with manager programs that wait to be promoted.
    pub fn with_standbys(managers: u8, workers: u8, standbys: u8) -> Self {
        let lab = Self { place: Place::take() };
        lab.ok(&format!(
            "dev up --managers {managers} --workers {workers} --standbys {standbys}"
        ));
        lab.until_all_ready();
        lab
    }

    /// A place for a cluster that is not made yet.
    pub fn nothing_yet() -> Self {
        Self { place: Place::take() }
    }

    /// A folder for whatever a test needs; other users may pass it.
    pub fn folder(&self) -> &Path {
        self.place.folder()
    }

    /// The folder of the local cluster.
    pub fn dev(&self) -> PathBuf {
        self.folder().join("dev")
    }

    /// Three numbers of the cluster's loopback network.
    pub fn network(&self) -> &str {
        self.place.network()
    }

    /// A program of this build, in the environment of this cluster's operator.
    pub fn program(&self, name: &str) -> Command {
        let programs = programs();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(programs.join(name));
        command
            .current_dir(self.folder())
            .env_clear()
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("HOME", self.folder())
            .env("XDG_CONFIG_HOME", self.folder().join("config"))
            .env("BULKHEAD_DEV_DIR", self.dev())
            .env("BULKHEAD_DEV_SUBNET", self.network());
        command
    }

    /// `bulkhead` with these words.
    pub fn command(&self, line: &str) -> Command {
        let mut command = self.program("bulkhead");
        command.args(line.split_whitespace());
        command
    }

    /// Runs `bulkhead` with these words.
    pub fn run(&self, line: &str) -> Answer {
        self.feed(line, b"")
    }

    /// Runs `bulkhead` with these words and this input.
    pub fn feed(&self, line: &str, input: &[u8]) -> Answer {
        Answer::of(&mut self.command(line), input)
    }

    /// What `bulkhead` prints; it must succeed.
    pub fn ok(&self, line: &str) -> String {
        self.run(line).success()
    }

    /// What `bulkhead` prints as JSON; it must succeed.
    pub fn json(&self, line: &str) -> Value {
        self.feed(&format!("--format json {line}"), b"").json()
    }

    /// The lines that `bulkhead` prints as JSON; it must succeed.
    pub fn list(&self, line: &str) -> Vec<Value> {
        match self.json(line) {
            Value::Array(all) => all,
            other => panic!("{line}: no list: {other}"),
        }
    }

    /// Stores the probe as an image.
    pub fn pack(&self, tag: &str) {
        let probe = programs().join("bulkhead-probe");
        let probe = probe.display();
        self.ok(&format!(
            "image pack {probe} -t {tag} --entrypoint /bin/bulkhead-probe --entrypoint serve"
        ));
    }

    /// Stores a secret.
    pub fn secret(&self, name: &str, value: &[u8]) {
        self.feed(&format!("secret create {name} -"), value).success();
    }

    /// The tasks of a service that run now.
    pub fn running(&self, service: &str) -> Vec<Value> {
        self.list(&format!("service ps {service} --filter state=running"))
    }

    /// Waits until so many tasks of a service run, and returns them.
    pub fn until_running(&self, service: &str, count: usize) -> Vec<Value> {
        eventually(&format!("{count} tasks of {service} run"), || {
            let tasks = self.running(service);
            match tasks.len() == count {
                true => Ok(tasks),
                false => Err(self.run(&format!("service ps {service}")).whole()),
            }
        })
    }

    /// The task and its host's process id, of each task of a service that runs.
    pub fn pids(&self, service: &str) -> BTreeMap<String, u64> {
        let tasks = self.running(service);
        let pid = |task: &Value| task["pid"].as_u64().expect("a running task has a process");
        tasks.iter().map(|task| (text(task, "id"), pid(task))).collect()
    }

    /// The loopback address of a node.
    pub fn address(&self, node: &str) -> String {
        text(&self.status(node), "address")
    }

    /// What `dev status` says of a node.
    pub fn status(&self, node: &str) -> Value {
        let nodes = self.list(&format!("dev status --filter name={node}"));
        nodes.into_iter().next().expect("a node of this name")
    }

    /// Waits until a node is in this state.
    pub fn until(&self, node: &str, state: &str) {
        eventually(&format!("{node} is {state}"), || {
            let status = self.status(node);
            match status["state"] == state {
                true => Ok(()),
                false => Err(status.to_string()),
            }
        });
    }

    /// Waits until all nodes are ready.
    pub fn until_all_ready(&self) {
        for node in self.nodes() {
            self.until(&node, "ready");
        }
    }

    /// The names of all nodes.
    pub fn nodes(&self) -> Vec<String> {
        self.list("dev status")
            .iter()
            .map(|node| text(node, "name"))
            .collect()
    }

    /// The process of a node's program.
    pub fn pid(&self, node: &str, program: &str) -> i32 {
        eventually(&format!("{program} of {node} runs"), || {
            let status = self.status(node);
            let programs = status["programs"].as_array().cloned().unwrap_or_default();
            let found = programs.iter().find(|one| one["name"] == program);
            let pid = found
                .and_then(|one| one["pid"].as_i64())
                .ok_or(status.to_string())?;
            Ok(i32::try_from(pid).expect("a process id"))
        })
    }

    /// The manager that leads.
    pub fn leader(&self) -> String {
        eventually("a manager leads", || {
            let nodes = self.list("dev status --filter leader=true");
            nodes
                .first()
                .map(|node| text(node, "name"))
                .ok_or("none does".into())
        })
    }

    /// All that a node's programs logged.
    pub fn log(&self, node: &str) -> String {
        let path = self.dev().join(node).join("log");
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Waits until a node's log says this.
    pub fn until_logged(&self, node: &str, words: &str) {
        eventually(&format!("{node} logs '{words}'"), || {
            let log = self.log(node);
            log.contains(words).then_some(()).ok_or_else(|| tail(&log))
        });
    }

    /// The data folder of a node's program.
    pub fn data(&self, node: &str) -> PathBuf {
        self.dev().join(node).join("data")
    }

    /// The local socket of a node's program.
    pub fn socket(&self, node: &str) -> PathBuf {
        match node.starts_with("manager") || node.starts_with("standby") {
            true => self.data(node).join("manager.sock"),
            false => self.data(node).join("worker/worker.sock"),
        }
    }

    /// Every process of the cluster: those whose control group lies below the cluster's.
    pub fn processes(&self) -> BTreeSet<i32> {
        left::members(&self.dev())
    }

    /// What the published port of a node answers; a reason if it does not.
    pub fn get(&self, node: &str, port: u16, path: &str) -> Result<String, String> {
        get(&format!("{}:{port}", self.address(node)), path)
    }

    fn logs(&self) -> String {
        let nodes = std::fs::read_dir(self.dev()).into_iter().flatten().flatten();
        nodes
            .filter_map(|node| {
                Some((
                    node.file_name(),
                    std::fs::read_to_string(node.path().join("log")).ok()?,
                ))
            })
            .map(|(name, log)| format!("-- {}\n{}\n", name.to_string_lossy(), tail(&log)))
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            eprintln!("{}", self.logs());
        }
        let leftovers = Leftovers::expected(&self.dev());
        if self.dev().exists() {
            let down = self.run("dev down");
            if down.code != 0 {
                eprintln!("{}", down.whole());
            }
        }
        let left = leftovers.found(self.folder());
        // A second panic would hide the first.
        match failed {
            true if !left.is_empty() => eprintln!("and this is left: {left:#?}"),
            true => {}
            false => assert!(left.is_empty(), "this is left: {left:#?}"),
        }
    }
}

/// A field's text.
pub fn text(value: &Value, key: &str) -> String {
    let found = value[key].as_str();
    found
        .unwrap_or_else(|| panic!("no text '{key}' in {value}"))
        .to_owned()
}

/// The body of an HTTP answer.
pub fn get(address: &str, path: &str) -> Result<String, String> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|e| format!("{address}: {e}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("a cut answer")?;
    match head.starts_with("HTTP/1.1 200 ") {
        true => Ok(body.to_owned()),
        false => Err(head.to_owned()),
    }
}

fn tail(log: &str) -> String {
    // On a busy machine late signs of life are many lines, and say little.
    let lines: Vec<&str> = log.lines().filter(|line| !line.contains("heartbeat")).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
