//! A command that goes on printing, until it was seen to print what is waited for.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::wait::PATIENCE;

/// A command whose lines are read as they come; it is killed with the value.
#[derive(Debug)]
pub struct Follow {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Follow {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// Whether a line that was not seen yet says this.
    pub fn saw(&mut self, words: &str) -> bool {
        self.lines.try_iter().any(|line| line.contains(words))
    }

    /// Waits for a line that says this.
    pub fn until(&mut self, words: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.max(Duration::from_millis(1))) {
                Ok(line) if line.contains(words) => return line,
                Ok(line) => self.seen.push(line),
                Err(_) => panic!("no line says '{words}': {:#?}", self.seen),
            }
        }
    }

    /// Ends it, and gives the lines that it had printed by then and that were not looked at.
    pub fn end(&mut self) -> Vec<String> {
        let _ = self.child.kill(); // it may have ended by itself
        self.lines.iter().collect()
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        // It may have ended by itself; it is waited for in any case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
