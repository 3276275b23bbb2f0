//! Looking for a value where it must not be: in files and in the memory of processes.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use data_encoding::{BASE64, HEXLOWER, HEXUPPER};

/// Read at once; findings that lie across two reads are found by the overlap.
const CHUNK_BYTES: usize = 1 << 20;
/// Longest form of a value.
const OVERLAP_BYTES: usize = 1 << 10;

/// A value in all forms that it might be written in.
#[derive(Debug)]
pub struct Needles {
    forms: Vec<(String, Vec<u8>)>,
    first: [bool; 256],
}

/// Where one form of the value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which file, or which mapping of which process.
    pub place: String,
    /// Which form.
    pub form: String,
    /// Offset or address.
    pub at: u64,
}

impl Needles {
    /// Raw, hexadecimal, and base64 wherever in a group of three bytes the value begins.
    pub fn of(value: &[u8]) -> Self {
        let mut forms = vec![
            ("raw".to_owned(), value.to_vec()),
            ("hex".to_owned(), HEXLOWER.encode(value).into_bytes()),
            ("HEX".to_owned(), HEXUPPER.encode(value).into_bytes()),
        ];
        for skipped in 0..3 {
            let rest = &value[skipped..];
            let whole = &rest[..rest.len() / 3 * 3];
            forms.push((format!("base64+{skipped}"), BASE64.encode(whole).into_bytes()));
        }
        let mut first = [false; 256];
        for (name, form) in &forms {
            assert!(form.len() > 16 && form.len() < OVERLAP_BYTES, "{name}");
            first[usize::from(form[0])] = true;
        }
        Self { forms, first }
    }

    fn search(&self, bytes: &[u8], base: u64, place: &str, found: &mut Vec<Finding>) {
        for (at, byte) in bytes.iter().enumerate() {
            if !self.first[usize::from(*byte)] {
                continue;
            }
            for (name, form) in &self.forms {
                if bytes[at..].starts_with(form) {
                    let finding = Finding {
                        place: place.to_owned(),
                        form: name.clone(),
                        at: base + at as u64,
                    };
                    if !found.contains(&finding) {
                        found.push(finding);
                    }
                }
            }
        }
    }

    fn search_range(
        &self,
        file: &fs::File,
        range: std::ops::Range<u64>,
        place: &str,
        found: &mut Vec<Finding>,
    ) {
        let mut buffer = vec![0; CHUNK_BYTES + OVERLAP_BYTES];
        let mut at = range.start;
        while at < range.end {
            let wanted = usize::try_from(range.end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            // A page that cannot be read, as of a mapping that went, ends the range.
            let Ok(read) = file.read_at(&mut buffer[..wanted], at) else {
                return;
            };
            if read == 0 {
                return;
            }
            self.search(&buffer[..read], at, place, found);
            at += if read > OVERLAP_BYTES {
                read - OVERLAP_BYTES
            } else {
                read
            } as u64;
            if read <= OVERLAP_BYTES {
                return;
            }
        }
    }
}

/// The value in any file below a folder.
pub fn files_below(folder: &Path, needles: &Needles) -> Vec<Finding> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        if kind.is_dir() {
            found.extend(files_below(&path, needles));
        } else if kind.is_file()
            && let Ok(file) = fs::File::open(&path)
        {
            needles.search_range(&file, 0..u64::MAX, &path.display().to_string(), &mut found);
        }
    }
    found
}

/// The value in the memory of a process: in what it can write, and in what no file holds.
///
/// # Errors
/// Where the process is gone or cannot be read.
pub fn memory_of(pid: i32, needles: &Needles) -> std::io::Result<Vec<Finding>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut found = Vec::new();
    for line in maps.lines() {
        let Some((range, writable, name)) = mapping(line) else {
            return Err(ErrorKind::InvalidData.into());
        };
        let of_a_file = name.starts_with('/');
        let special = ["[vvar]", "[vvar_vclock]", "[vsyscall]"].contains(&name);
        if special || (of_a_file && !writable) {
            continue;
        }
        needles.search_range(&memory, range, &format!("process {pid} {name}"), &mut found);
    }
    Ok(found)
}

/// Range, whether it can be written, and name of a line of `maps`; ranges that cannot be read are empty.
fn mapping(line: &str) -> Option<(std::ops::Range<u64>, bool, &str)> {
    let mut parts = line.split_ascii_whitespace();
    let (from, to) = parts.next()?.split_once('-')?;
    let modes = parts.next()?;
    let name = parts.nth(3).unwrap_or_default();
    let from = u64::from_str_radix(from, 16).ok()?;
    let to = u64::from_str_radix(to, 16).ok()?;
    let range = if modes.starts_with('r') {
        from..to
    } else {
        from..from
    };
    Some((range, modes.contains('w'), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &[u8] = b"a value that is long enough to be found";

    fn forms_in(bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        Needles::of(VALUE).search(bytes, 0, "x", &mut found);
        found.into_iter().map(|finding| finding.form).collect()
    }

    #[test]
    fn every_form_is_found_wherever_it_begins() {
        assert_eq!(forms_in(&[b"..", VALUE].concat()), ["raw"]);
        assert_eq!(forms_in(HEXLOWER.encode(VALUE).as_bytes()), ["hex"]);
        for skipped in 0..3 {
            let text = BASE64.encode(&[&b"zz"[..skipped], VALUE, b"!"].concat());
            assert_eq!(forms_in(text.as_bytes()).len(), 1, "{skipped}");
        }
        assert!(forms_in(&VALUE[1..]).is_empty());
    }

    #[test]
    fn own_memory_and_files_are_searched() {
        let folder = tempfile::tempdir().expect("a folder");
        // As long as two reads, so that the value lies where they meet.
        let mut content = vec![b'.'; CHUNK_BYTES + OVERLAP_BYTES - 10];
        content.extend_from_slice(VALUE);
        fs::write(folder.path().join("f"), &content).expect("written");
        let found = files_below(folder.path(), &Needles::of(VALUE));
        assert_eq!(found.len(), 1, "{found:?}");

        let own = i32::try_from(std::process::id()).expect("a pid");
        let found = memory_of(own, &Needles::of(VALUE)).expect("its own memory");
        assert!(found.iter().any(|finding| finding.form == "raw"), "{found:?}");
        drop(content);
    }
}
