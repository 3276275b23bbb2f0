//! What a program printed and how it ended.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Answer {
    /// What was run, for messages.
    pub line: String,
    /// The exit code; 128 and the signal where one ended it.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it printed beside that.
    pub err: String,
}

impl Answer {
    /// Runs a program to its end, with this as its input.
    pub fn of(command: &mut Command, input: &[u8]) -> Self {
        Self::started(command, input, |_| {})
    }

    /// As [`Answer::of`]; once it ended, but before its output did, `after` is told its process id.
    ///
    /// What it left running may hold its output open for ever.
    pub fn started(command: &mut Command, input: &[u8], after: impl FnOnce(u32)) -> Self {
        let line = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{line}: {e}"));
        let mut stdin = child.stdin.take().expect("piped");
        // One that ends without reading it all says why by its exit code.
        let _ = stdin.write_all(input);
        drop(stdin);
        let (out, err) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let out = scope.spawn(|| text_of(out));
            let err = scope.spawn(|| text_of(err));
            let status = child.wait().unwrap_or_else(|e| panic!("{line}: {e}"));
            after(child.id());
            Self {
                code: status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
                out: out.join().expect("a reader"),
                err: err.join().expect("a reader"),
                line,
            }
        })
    }

    /// Everything, for messages.
    pub fn whole(&self) -> String {
        format!("{}\nexit code {}\n{}{}", self.line, self.code, self.out, self.err)
    }

    /// What it printed, without the last line's end; it must have succeeded.
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "{}", self.whole());
        self.out.trim_end().to_owned()
    }

    /// The JSON that it printed; it must have succeeded.
    pub fn json(self) -> Value {
        let line = self.line.clone();
        let text = self.success();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{line}: {e}\n{text}"))
    }

    /// It must have been refused so; the refusal says where, why and what next.
    pub fn refused(self, exit: i32, code: &str) -> Self {
        assert_eq!(self.code, exit, "{}", self.whole());
        for part in [&format!("error[{code}]"), "where:", "why:", "help:"] {
            assert!(self.err.contains(part), "no '{part}' in {}", self.whole());
        }
        self
    }

    /// It must say this somewhere.
    pub fn says(self, text: &str) -> Self {
        let everything = format!("{}{}", self.out, self.err);
        assert!(everything.contains(text), "no '{text}' in {}", self.whole());
        self
    }
}

fn text_of(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    let read = from.expect("piped").read_to_end(&mut bytes);
    read.expect("a pipe");
    String::from_utf8_lossy(&bytes).into_owned()
}
