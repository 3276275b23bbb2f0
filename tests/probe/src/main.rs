//! `bulkhead-probe`: a task that tells what it sees, and tries what it must not.
//!
//! One static file, so that an image of nothing else runs it. The sandbox tests are made of its
//! JSON, the demonstration of its web server.

#![allow(
    clippy::disallowed_methods,
    reason = "a task of its own: no simulation drives its clock or environment"
)]

mod calls;
mod inspect;
mod json;
mod serve;
mod sha256;

use std::io::Write;
use std::time::Duration;

const USAGE: &str = "usage: bulkhead-probe serve [--port N] | inspect | syscalls | env | exit CODE | crash |
       sleep [SECONDS] | hog-memory | fork-bomb | log LINES | lines LENGTH COUNT | reopen | ignore-term";

fn main() {
    // Before anything else is opened: what was there at the first instruction.
    let descriptors = inspect::open_descriptors();
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize, default: u64| arguments.get(at).and_then(|n| n.parse().ok()).unwrap_or(default);
    match arguments.get(1).map(String::as_str) {
        Some("serve") => {
            let port = if arguments.get(2).is_some_and(|flag| flag == "--port") {
                number(3, 80)
            } else {
                80
            };
            serve::serve(
                u16::try_from(port).expect("a port is at most 65535"),
                &descriptors,
            );
        }
        Some("inspect") => println!("{}", inspect::inspect(&descriptors)),
        Some("syscalls") => println!("{}", calls::refused()),
        Some("env") => {
            for (name, value) in std::env::vars() {
                println!("{name}={value}");
            }
        }
        Some("exit") => std::process::exit(i32::try_from(number(2, 0)).unwrap_or(1)),
        Some("crash") => {
            // Process 1 of a namespace ignores what it sends itself, but not what the processor raises.
            // SAFETY: it is not safe; that is the point.
            unsafe { std::ptr::null_mut::<u8>().write_volatile(1) }
        }
        Some("sleep") => std::thread::sleep(Duration::from_secs(number(2, 3_600))),
        Some("ignore-term") => {
            // As process 1 of its namespace a program without a handler does not notice SIGTERM.
            println!("ready");
            std::thread::sleep(Duration::from_secs(3_600));
        }
        Some("hog-memory") => hog_memory(),
        Some("fork-bomb") => calls::fork_bomb(),
        Some("log") => {
            for line in 0..number(2, 10) {
                println!("line {line}");
            }
        }
        Some("lines") => {
            let line = "x".repeat(usize::try_from(number(2, 80)).unwrap_or(80));
            for _ in 0..number(3, 1) {
                println!("{line}");
            }
        }
        Some("reopen") => {
            let mut again = std::fs::File::options()
                .write(true)
                .open("/dev/stdout")
                .expect("open /dev/stdout");
            writeln!(again, "reopened").expect("write to /dev/stdout");
            let mut again = std::fs::File::options()
                .write(true)
                .open("/dev/stderr")
                .expect("open /dev/stderr");
            writeln!(again, "reopened too").expect("write to /dev/stderr");
        }
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2)
        }
    }
}

/// Touches ever more memory, until something stops it.
fn hog_memory() {
    println!("taking memory");
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        held.push(vec![1; 4 << 20]);
        std::hint::black_box(&held);
    }
}
