//! `make demo` as a test: the tour itself with the programs of this build, and what it leaves behind.

use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::{Lab, may_run, programs};

#[test]
fn the_tour_ends_well_and_leaves_nothing() {
    if !may_run() {
        return;
    }
    // It is checked for what is left when it is dropped.
    let lab = Lab::nothing_yet();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo.sh");
    let output = Command::new("bash")
        .arg(script)
        .env("BULKHEAD_BIN", programs())
        .env("DEMO_SUBNET", lab.network())
        .env("TMPDIR", lab.folder())
        .env_remove("KEEP")
        .output()
        .expect("bash starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("The tour is over."), "{text}");
    let left = std::fs::read_dir(lab.folder()).expect("the folder").flatten();
    let left: Vec<PathBuf> = left.map(|entry| entry.path()).collect();
    assert_eq!(left, Vec::<PathBuf>::new(), "files are left");
}
