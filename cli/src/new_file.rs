//! Files that hold what must not be lost or seen: made for their owner alone, and never over another file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::refusal::{Code, Refusal};

/// Makes a file that is not there yet, mode 0600. Called before what it is to hold is made, so that this cannot be lost
/// for want of a place.
pub(crate) fn claim(path: &Path) -> Result<File, Refusal> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| unwritable(path, &error))
}

/// A file that cannot be written.
pub(crate) fn unwritable(path: &Path, error: &std::io::Error) -> Refusal {
    let place = path.display().to_string();
    let help = "name a new file in a writable folder with -o";
    Refusal::new(Code::Unwritable, place, error.to_string(), help)
}

/// Removes a file that was claimed and is of no use.
pub(crate) fn give_up(path: &Path) {
    // It was made for this alone; what stays is empty or worthless, and in the way of the next try, which says so.
    let _ = std::fs::remove_file(path);
}
