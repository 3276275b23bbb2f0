//! `make demo` as a test: the tour itself with the programs of this build, and what it leaves behind.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the programs, which `make test` builds before the tests run.
fn programs() -> PathBuf {
    // target/TRIPLE/debug/deps/test-program
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.ancestors().nth(2).expect("two folders up").to_owned();
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

/// Claims of user ids by launchers below this folder.
fn claims_of(folder: &Path) -> Vec<PathBuf> {
    let claims = std::fs::read_dir("/run/bulkhead/id-ranges");
    let claims = claims.into_iter().flatten().flatten().map(|entry| entry.path());
    claims
        .filter(|claim| {
            std::fs::read_to_string(claim).is_ok_and(|owner| Path::new(&owner).starts_with(folder))
        })
        .collect()
}

/// Processes whose arguments name this folder.
fn processes_of(folder: &Path) -> Vec<String> {
    let needle = folder.to_string_lossy().into_owned();
    let lines = std::fs::read_dir("/proc").expect("/proc").flatten().map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default(); // it may have ended
        String::from_utf8_lossy(&line).replace('\0', " ")
    });
    lines.filter(|line| line.contains(&needle)).collect()
}

#[test]
fn the_tour_ends_well_and_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: it needs root");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Every node's user must be able to reach what is its own in it.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(folder.path(), open).expect("its owner may");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo.sh");
    let output = Command::new("bash")
        .arg(script)
        .env("BULKHEAD_BIN", programs())
        .env("DEMO_SUBNET", "127.81.0")
        .env("TMPDIR", folder.path())
        .env_remove("KEEP")
        .output()
        .expect("bash starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("The tour is over."), "{text}");
    assert_eq!(
        processes_of(folder.path()),
        Vec::<String>::new(),
        "processes are left"
    );
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("the folder")
        .flatten()
        .collect();
    assert!(left.is_empty(), "files are left: {left:?}");
    assert_eq!(
        claims_of(folder.path()),
        Vec::<PathBuf>::new(),
        "claims of ids are left"
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(
        !mounts.contains(&*folder.path().to_string_lossy()),
        "mounts are left"
    );
}
