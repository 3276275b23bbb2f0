//! A shell that answers each line with one, for tests that change something about a process while it runs.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub(crate) struct Shell {
    child: Child,
    asks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Shell {
    /// Does `what`, bash, for each line.
    pub(crate) fn that_does(what: &str) -> Self {
        let mut child = Command::new("bash")
            .args(["-c", &format!("while read -r _; do {what}; done 2>/dev/null")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let asks = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, asks, answers }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn ask(&mut self) -> String {
        let asks = self.asks.as_mut().expect("it is still asked");
        asks.write_all(b"\n").expect("it reads");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        line.trim().to_owned()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        drop(self.asks.take()); // the end of its input ends it
        let _ended = self.child.wait();
    }
}
