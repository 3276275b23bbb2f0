use std::path::PathBuf;

use super::*;

/// Walks every sequence of choices, depth first: an exhaustive chooser.
#[derive(Default)]
pub(crate) struct EveryChoice {
    path: Vec<(usize, usize)>, // picked, of how many
    at: usize,
}

impl EveryChoice {
    pub(crate) fn pick(&mut self, below: usize) -> usize {
        if self.at == self.path.len() {
            self.path.push((0, below));
        }
        let (picked, of) = self.path[self.at];
        assert_eq!(of, below, "the same choices must be offered on each walk");
        self.at += 1;
        picked
    }

    /// Moves to the next sequence; false when all were walked.
    pub(crate) fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((picked, of)) = self.path.pop() {
            if picked + 1 < of {
                self.path.push((picked + 1, of));
                return true;
            }
        }
        false
    }
}

fn store() -> PathBuf {
    PathBuf::from("/store")
}

fn create(fs: &dyn FileSystem, name: &str, content: &[u8]) -> Box<dyn File> {
    let file = fs
        .open(&store().join(name), OpenMode::CreateNew)
        .expect("a new file");
    file.write_all_at(content, 0).expect("a write");
    file
}

fn content(fs: &dyn FileSystem, name: &str) -> Option<Vec<u8>> {
    read_file(fs, &store().join(name), 1 << 20).ok()
}

#[test]
fn every_crash_of_a_replaced_file_leaves_the_old_or_the_new_content() {
    let old = vec![b'o'; 1500];
    let new = vec![b'n'; 1700];
    let mut choices = EveryChoice::default();
    let (mut states, mut olds) = (0, 0);
    loop {
        let fs = SimFileSystem::new();
        fs.create_directory(&store()).expect("a folder");
        replace_file(&fs, &store().join("key"), &old).expect("the first content");
        // The replacement, without its last step: the folder was not synced when the power went.
        let file = create(&fs, "key.new", &new);
        file.sync_data().expect("a sync");
        fs.rename(&store().join("key.new"), &store().join("key"))
            .expect("a rename");
        fs.crash(&mut |below| choices.pick(below));
        let found = content(&fs, "key").expect("one of both is there");
        assert!(found == old || found == new);
        olds += usize::from(found == old);
        states += 1;
        if !choices.advance() {
            break;
        }
    }
    assert!(
        0 < olds && olds < states,
        "both outcomes must have been reached: {olds} of {states}"
    );
}

#[test]
fn an_unsynced_write_can_be_torn_at_a_sector_and_a_synced_one_cannot() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let fs = SimFileSystem::new();
        fs.create_directory(&store()).expect("a folder");
        let file = create(&fs, "log", &[1; 1024]);
        file.sync_data().expect("a sync");
        fs.sync_directory(&store()).expect("a sync");
        file.write_all_at(&[2; 1024], 0).expect("a write");
        fs.crash(&mut seeded_chooser(seed));
        let found = content(&fs, "log").expect("the name was synced");
        assert_eq!(found.len(), 1024);
        for sector in found.chunks(512) {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "a sector is written as one"
            );
        }
        seen.insert((found[0], found[1023]));
    }
    assert_eq!(
        seen.into_iter().collect::<Vec<_>>(),
        [(1, 1), (1, 2), (2, 1), (2, 2)]
    );
}

#[test]
fn a_name_that_was_not_synced_can_be_lost() {
    let mut outcomes = [false; 2];
    for seed in 0..20 {
        let fs = SimFileSystem::new();
        fs.create_directory(&store()).expect("a folder");
        create(&fs, "segment", b"x").sync_data().expect("a sync");
        fs.crash(&mut seeded_chooser(seed));
        outcomes[usize::from(content(&fs, "segment").is_some())] = true;
    }
    assert_eq!(outcomes, [true, true]);
}

#[test]
fn a_program_of_before_the_crash_reaches_nothing() {
    let fs = SimFileSystem::new();
    fs.create_directory(&store()).expect("a folder");
    let file = create(&fs, "log", b"x");
    let lock = fs.lock(&store()).expect("a lock");
    fs.crash(&mut seeded_chooser(1));
    assert!(file.write_all_at(b"ghost", 0).is_err());
    let again = fs.lock(&store()).expect("a crash lets go");
    drop(lock); // must not let go of the new one
    assert_eq!(
        fs.lock(&store()).expect_err("held").kind(),
        io::ErrorKind::WouldBlock
    );
    drop(again);
    fs.lock(&store()).expect("free again");
}

#[test]
fn a_full_disk_refuses_growth_and_nothing_else() {
    let fs = SimFileSystem::new();
    fs.create_directory(&store()).expect("a folder");
    let file = create(&fs, "log", &[0; 100]);
    fs.set_capacity(Some(150));
    assert_eq!(fs.free_bytes(&store()).expect("a size"), 50);
    file.write_all_at(&[1; 100], 0)
        .expect("preallocated space stays usable");
    let error = file.write_all_at(&[1; 100], 100).expect_err("no space");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    fs.set_fault(Fault::WriteError);
    assert!(file.sync_data().is_err());
}

#[test]
fn both_systems_agree_on_what_a_store_relies_on() {
    let folder = std::env::temp_dir().join(format!("bulkhead-fs-{}", std::process::id()));
    let sim = SimFileSystem::new();
    let systems: [&dyn FileSystem; 2] = [&RealFileSystem, &sim];
    for fs in systems {
        fs.create_directory(&folder).expect("a folder");
        fs.create_directory(&folder).expect("again is fine");
        let path = folder.join("a");
        let missing = fs.open(&path, OpenMode::Write).expect_err("not there");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let file = fs.open(&path, OpenMode::CreateNew).expect("a new file");
        let twice = fs.open(&path, OpenMode::CreateNew).expect_err("there already");
        assert_eq!(twice.kind(), io::ErrorKind::AlreadyExists);
        assert!(file.is_empty().expect("a size"));
        file.write_all_at(b"hello", 3)
            .expect("a write past the end fills with zeros");
        assert_eq!(read_file(fs, &path, 8).expect("content"), b"\0\0\0hello");
        assert_eq!(
            read_file(fs, &path, 7).expect_err("too large").kind(),
            io::ErrorKind::FileTooLarge
        );
        let short = file.read_exact_at(&mut [0; 9], 0).expect_err("too short");
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
        file.set_len(4).expect("a cut");
        assert_eq!(file.len().expect("a size"), 4);
        replace_file(fs, &path, b"new").expect("a replacement");
        replace_file(fs, &path, b"newer").expect("another");
        assert_eq!(fs.list(&folder).expect("names"), ["a"]);
        assert_eq!(read_file(fs, &path, 8).expect("content"), b"newer");
        assert!(
            fs.open(&path, OpenMode::Read)
                .expect("a file")
                .write_all_at(b"x", 0)
                .is_err()
        );
        let lock = fs.lock(&folder).expect("a lock");
        assert_eq!(
            fs.lock(&folder).expect_err("held").kind(),
            io::ErrorKind::WouldBlock
        );
        drop(lock);
        fs.lock(&folder).expect("free again");
        fs.unlink(&path).expect("an unlink");
        assert_eq!(fs.list(&folder).expect("names"), Vec::<String>::new());
        assert!(fs.free_bytes(&folder).expect("a size") > 0);
    }
    std::fs::remove_dir(&folder).expect("nothing was left in it");
}

#[test]
fn what_is_left_of_a_killed_program_changes_no_name() {
    let disk = SimFileSystem::new();
    let before = disk.mounted();
    before.create_directory(Path::new("/d")).expect("made");
    before.open(Path::new("/d/a"), OpenMode::CreateNew).expect("made");
    disk.kill();
    before
        .rename(Path::new("/d/a"), Path::new("/d/b"))
        .expect_err("it is dead");
    let now = disk.mounted();
    assert_eq!(now.list(Path::new("/d")).expect("there"), ["a"]);
    now.rename(Path::new("/d/a"), Path::new("/d/b")).expect("alive");
}
