//! How long a start takes, from the request to the program's execution, and what it costs. Prints one line of JSON.
//!
//! `cargo bench -p bulkhead-launcher --bench start -- [COUNT]`, as root. The image is the probe alone; each task ends at
//! once and is removed before the next start, so the figures are those of a node that is otherwise idle.
#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on fails")]
#![allow(
    clippy::disallowed_methods,
    reason = "it measures real programs by the machine's clock"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};
use support::{Layer, Node, cargo_build, is_root, task};

/// Starts that are not measured: page cache, first verification of the layer.
const WARM_UP: usize = 10;

fn main() {
    if !is_root() {
        return;
    }
    let count = std::env::args().find_map(|n| n.parse().ok()).unwrap_or(200);
    // `cargo bench` builds no examples; this one stands where the worker stands.
    cargo_build(&["-p", "bulkhead-launcher", "--example", "hand_over"]);
    let mut node = Node::start();
    let mut spec = node.spec("warm-up", vec![Layer::scratch()], &["exit"]);
    let mut times = Vec::with_capacity(count);
    let mut cpu = Duration::ZERO;
    for n in 0..WARM_UP + count {
        if n == WARM_UP {
            cpu = cpu_of(node.launcher_pid());
        }
        spec.task = task(&format!("t{n}"));
        let start = Instant::now();
        node.start_task(&spec).unwrap();
        let took = start.elapsed();
        node.wait_exit(&spec.task);
        node.remove(&spec.task).unwrap();
        if n >= WARM_UP {
            times.push(took);
        }
    }
    let cpu = (cpu_of(node.launcher_pid()) - cpu) / u32::try_from(count).unwrap();
    times.sort();
    let at = |part: usize| millis(times[(times.len() * part / 100).min(times.len() - 1)]);
    println!(
        "{}",
        serde_json::json!({
            "bench": "task-start",
            "what": "request to the launcher until the program was executed",
            "n": count,
            "p50_ms": at(50),
            "p99_ms": at(99),
            "max_ms": at(100),
            "cpu_ms_per_task": millis(cpu),
            "cpu_what": "launcher and supervisor, start to removal",
        })
    );
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Processor time of a process and of its ended children (`proc_pid_stat(5)`, fields 14 to 17, in hundredths).
fn cpu_of(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let ticks: u64 = after_name
        .split_whitespace()
        .skip(11)
        .take(4)
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    Duration::from_millis(ticks * 10)
}
