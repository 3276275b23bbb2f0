//! Every command block of the README and the documents runs as it stands.
//!
//! Blocks fenced with `sh` run in order, file by file, each in a shell of its own and all of a file in one folder. Blocks
//! that begin with `# needs:` are listed, not run; transcripts are fenced with `text` or `console`. Only the
//! network of the local cluster is replaced, so that several can be tested at once.

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use bulkhead_tests::{Answer, Lab, may_run};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The network that documents name.
const NETWORK: &str = "127.77.0";

#[test]
fn every_command_block_of_the_documents_runs() {
    if !may_run() {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("README.md")];
    files.extend(documents(&root.join("docs")));
    let lab = Lab::nothing_yet();
    let mut run = 0;
    for (at, file) in files.iter().enumerate() {
        let text = std::fs::read_to_string(file).expect("a document");
        let folder = lab.folder().join(format!("blocks-{at}"));
        for (line, block) in blocks(&text) {
            let name = format!("{}:{line}", file.strip_prefix(&root).expect("below it").display());
            if let Some(needs) = block
                .lines()
                .next()
                .and_then(|first| first.strip_prefix("# needs:"))
            {
                eprintln!("{name}: not run, it needs{needs}");
                continue;
            }
            // Managers are users of their own, and pass through.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(&folder)
                .expect("its own");
            eprintln!("{name}: runs");
            run_block(&lab, &folder, &name, &block);
            run += 1;
        }
    }
    assert!(run > 1, "the README alone has more");
}

fn run_block(lab: &Lab, folder: &Path, name: &str, block: &str) {
    let script = format!("set -euo pipefail\n{}", block.replace(NETWORK, lab.network()));
    let mut command = lab.program("bulkhead");
    let environment: Vec<_> = command
        .get_envs()
        .filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
        .collect();
    command = std::process::Command::new("bash");
    // A group of its own, for what a block that failed leaves running.
    command
        .arg("-c")
        .arg(&script)
        .current_dir(folder)
        .env_clear()
        .envs(environment)
        .process_group(0);
    let answer = Answer::started(&mut command, b"", |group| {
        let group = Pid::from_raw(i32::try_from(group).expect("a process id"));
        // Nobody is in it any more where the block ended well.
        let _ = killpg(group, Signal::SIGKILL);
    });
    assert_eq!(answer.code, 0, "{name}:\n{block}\n{}{}", answer.out, answer.err);
}

/// The first line's number and the text of each block that is fenced with `sh`.
fn blocks(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (at, line) in text.lines().enumerate() {
        match &mut open {
            None if line.trim_end() == "```sh" => open = Some((at + 2, String::new())),
            None => {}
            Some(_) if line.trim_end() == "```" => found.extend(open.take()),
            Some((_, block)) => {
                block.push_str(line);
                block.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

/// Every document below a folder, in order.
fn documents(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the documents").flatten();
    let mut all: Vec<PathBuf> = entries
        .flat_map(|entry| match entry.path().is_dir() {
            true => documents(&entry.path()),
            false => vec![entry.path()],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    all.sort();
    all
}

#[test]
fn blocks_are_what_is_fenced_with_sh() {
    let text = "a\n```sh\none\ntwo\n```\n```text\n$ three\n```\n```sh\n# needs: docker\nfour\n```\n";
    let found = blocks(text);
    let want = [(3, "one\ntwo\n"), (10, "# needs: docker\nfour\n")];
    assert_eq!(found, want.map(|(line, block)| (line, block.to_owned())));
}
