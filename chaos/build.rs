//! Which commit a report is of.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=../.git/HEAD");
    println!("cargo:rerun-if-changed=../.git/refs/heads");
    let asked = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let commit = asked.ok().filter(|it| it.status.success());
    let commit = commit.and_then(|it| String::from_utf8(it.stdout).ok());
    // Sources without their history: the program's hash says what ran.
    let commit = commit.map_or("unknown".to_owned(), |it| it.trim().to_owned());
    println!("cargo:rustc-env=BULKHEAD_COMMIT={commit}");
}
