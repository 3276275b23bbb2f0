//! The program that libFuzzer drives: `FUZZ_TARGET` names what gets the bytes. `--names` lists the targets, `--seeds
//! FOLDER` writes what one begins with.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use bulkhead_fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let target = TARGETS.iter().find(|it| it.name == name);
    target.unwrap_or_else(|| {
        let names: Vec<_> = TARGETS.iter().map(|it| it.name).collect();
        eprintln!("FUZZ_TARGET is one of {}", names.join(", "));
        std::process::exit(3)
    })
});

fn begin() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--names"] => TARGETS.iter().for_each(|it| println!("{}", it.name)),
        ["--seeds", folder] => {
            for (number, seed) in (TARGET.seeds)().iter().enumerate() {
                let path = Path::new(folder).join(format!("seed-{number}"));
                if let Err(error) = std::fs::write(&path, seed) {
                    eprintln!("could not write {}: {error}", path.display());
                    std::process::exit(3);
                }
            }
        }
        _ => return,
    }
    std::process::exit(0);
}

fuzz_target!(init: begin(), |bytes: &[u8]| (TARGET.run)(bytes));
