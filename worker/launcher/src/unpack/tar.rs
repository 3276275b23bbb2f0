//! A tar reader with one strict meaning.
//!
//! Archives are parsed differently by different programs (CVE-2025-62518 and its kind): what one
//! scans, another extracts. Here whatever has two readings is refused: a PAX size that disagrees with the
//! header, a long name given twice, sparse files, damaged numbers, data after the end.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// A PAX or long-name record; names are at most 4 KiB, extended attributes are ignored but must be skipped over.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of this size, whose content follows.
    File(u64),
    /// A folder.
    Folder,
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// Another name for an earlier file of the archive.
    Hardlink(Vec<u8>),
}

/// One entry, its names as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, as written.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since 1970, never before.
    pub modified: u64,
}

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// It cannot be read, or decompressed.
    #[error("the archive cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is malformed or ambiguous.
    #[error("the archive is refused: {0}")]
    Malformed(&'static str),
}

/// Extensions that apply to the next entry.
#[derive(Debug, Default)]
struct Pending {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<u64>,
}

/// Reads entries one after the other.
#[derive(Debug)]
pub struct Archive<R> {
    source: R,
    /// Content of the current entry not read yet, and the padding after it.
    left: u64,
    padding: usize,
}

impl<R: Read> Archive<R> {
    /// Starts at the beginning of an archive.
    pub fn new(source: R) -> Self {
        Archive {
            source,
            left: 0,
            padding: 0,
        }
    }

    /// The next entry; `None` after the last, when everything up to the end was seen to be padding.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut pending = Pending::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = number(&header[124..136])?;
            match header[156] {
                b'x' => parse_pax(&self.extension(size)?, &mut pending)?,
                b'g' => parse_global(&self.extension(size)?)?,
                b'L' => set_once(&mut pending.path, long_name(self.extension(size)?))?,
                b'K' => set_once(&mut pending.link, long_name(self.extension(size)?))?,
                kind => return self.entry(&header, kind, size, pending).map(Some),
            }
        }
    }

    /// Reads content of the current entry.
    pub fn read_content(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0); // a decompressor takes an empty buffer for a mistake
        }
        let read = self.source.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        Ok(read)
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        kind: u8,
        size: u64,
        pending: Pending,
    ) -> Result<Entry, TarError> {
        if pending.size.is_some_and(|pax| pax != size) {
            return Err(TarError::Malformed("two sizes for one entry"));
        }
        let path = pending.path.map_or_else(|| header_path(header), Ok)?;
        let link = || {
            pending
                .link
                .clone()
                .unwrap_or_else(|| until_zero(&header[157..257]).to_vec())
        };
        let kind = match kind {
            b'0' | 0 if path.ends_with(b"/") => {
                return Err(TarError::Malformed("a file whose name ends with /"));
            }
            b'0' | 0 => Kind::File(size),
            b'1' => Kind::Hardlink(link()),
            b'2' => Kind::Symlink(link()),
            b'5' => Kind::Folder,
            b'3' | b'4' | b'6' => return Err(TarError::Malformed("a device or pipe")),
            b'S' => return Err(TarError::Malformed("a sparse file")),
            _ => return Err(TarError::Malformed("an unknown kind of entry")),
        };
        if let Kind::File(size) = kind {
            self.expect(size);
        } else if size != 0 {
            return Err(TarError::Malformed("content where none can be"));
        }
        let mode = u32::try_from(number(&header[100..108])?).map_err(|_| TarError::Malformed("a mode"))?;
        let modified = pending.modified.map_or_else(|| time(&header[136..148]), Ok)?;
        let uid = pending.uid.map_or_else(|| number(&header[108..116]), Ok)?;
        let gid = pending.gid.map_or_else(|| number(&header[116..124]), Ok)?;
        Ok(Entry {
            path,
            kind,
            mode,
            uid,
            gid,
            modified,
        })
    }

    fn expect(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK - usize::try_from(size % BLOCK as u64).expect("below a block")) % BLOCK;
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut buffer = [0; 8192];
        while self.left > 0 {
            self.read_content(&mut buffer)?;
        }
        self.source
            .read_exact(&mut buffer[..std::mem::take(&mut self.padding)])?;
        Ok(())
    }

    /// The content of an extension.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION_BYTES {
            return Err(TarError::Malformed("an extension over its limit"));
        }
        self.expect(size);
        let mut content = vec![0; usize::try_from(size).expect("below the limit")];
        self.source.read_exact(&mut content)?;
        self.left = 0;
        Ok(content)
    }

    /// The next header with its checksum right; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        self.source.read_exact(&mut block)?;
        if block == [0; BLOCK] {
            self.expect_padding_only()?;
            return Ok(None);
        }
        let sum = |(at, byte): (usize, &u8)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte });
        if number(&block[148..156])? != block.iter().enumerate().map(sum).sum::<u64>() {
            return Err(TarError::Malformed("a wrong checksum"));
        }
        Ok(Some(block))
    }

    fn expect_padding_only(&mut self) -> Result<(), TarError> {
        let mut buffer = [0; 8192];
        let mut seen = 0;
        loop {
            let read = self.source.read(&mut buffer)?;
            if buffer[..read].iter().any(|byte| *byte != 0) {
                return Err(TarError::Malformed("data after the end"));
            }
            seen += read;
            if read == 0 {
                return if seen >= BLOCK {
                    Ok(())
                } else {
                    Err(TarError::Malformed("a cut-off end"))
                };
            }
        }
    }
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn long_name(mut content: Vec<u8>) -> Vec<u8> {
    if content.last() == Some(&0) {
        content.pop();
    }
    content
}

fn set_once<T>(place: &mut Option<T>, value: T) -> Result<(), TarError> {
    if place.replace(value).is_some() {
        return Err(TarError::Malformed("one property given twice"));
    }
    Ok(())
}

fn header_path(header: &[u8; BLOCK]) -> Result<Vec<u8>, TarError> {
    let name = until_zero(&header[..100]);
    let prefix = if &header[257..263] == b"ustar\0" {
        until_zero(&header[345..500])
    } else {
        &[]
    };
    let joined = if prefix.is_empty() {
        name.to_vec()
    } else {
        [prefix, name].join(&b'/')
    };
    if joined.is_empty() {
        Err(TarError::Malformed("an entry without a name"))
    } else {
        Ok(joined)
    }
}

/// Octal with blanks around it, or binary when its highest bit is set.
fn number(field: &[u8]) -> Result<u64, TarError> {
    let wrong = TarError::Malformed("a damaged number");
    if field[0] == 0x80 {
        let (high, low) = field.split_at(field.len() - 8.min(field.len() - 1));
        if high[1..].iter().any(|byte| *byte != 0) {
            return Err(wrong);
        }
        return Ok(low.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    }
    let text = until_zero(field).trim_ascii();
    text.iter().try_fold(0u64, |sum, byte| match byte {
        b'0'..=b'7' => Ok(sum * 8 + u64::from(byte - b'0')),
        _ => Err(TarError::Malformed("a damaged number")),
    })
}

/// Times before 1970, which only the binary form can say, count as 1970.
fn time(field: &[u8]) -> Result<u64, TarError> {
    if field[0] == 0xff { Ok(0) } else { number(field) }
}

/// Key and value.
type PaxRecord<'a> = (&'a [u8], &'a [u8]);

/// `LENGTH KEY=VALUE\n`, the length counting all of it.
fn pax_records(mut content: &[u8]) -> Result<Vec<PaxRecord<'_>>, TarError> {
    let wrong = || TarError::Malformed("a damaged PAX record");
    let mut records = Vec::new();
    while !content.is_empty() {
        let space = content
            .iter()
            .take(8)
            .position(|byte| *byte == b' ')
            .ok_or_else(wrong)?;
        let length = decimal(&content[..space])
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(wrong)?;
        let (record, rest) = content.split_at_checked(length).ok_or_else(wrong)?;
        let body = record
            .get(space + 1..)
            .and_then(|body| body.strip_suffix(b"\n"))
            .ok_or_else(wrong)?;
        let equals = body.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        records.push((&body[..equals], &body[equals + 1..]));
        content = rest;
    }
    Ok(records)
}

fn parse_pax(content: &[u8], pending: &mut Pending) -> Result<(), TarError> {
    let wrong = || TarError::Malformed("a damaged PAX number");
    for (key, value) in pax_records(content)? {
        match key {
            b"path" if !value.is_empty() => set_once(&mut pending.path, value.to_vec())?,
            b"linkpath" if !value.is_empty() => set_once(&mut pending.link, value.to_vec())?,
            b"path" | b"linkpath" => return Err(TarError::Malformed("an empty name")),
            b"size" => set_once(&mut pending.size, decimal(value).ok_or_else(wrong)?)?,
            b"uid" => set_once(&mut pending.uid, decimal(value).ok_or_else(wrong)?)?,
            b"gid" => set_once(&mut pending.gid, decimal(value).ok_or_else(wrong)?)?,
            b"mtime" => set_once(&mut pending.modified, pax_time(value).ok_or_else(wrong)?)?,
            key if key.starts_with(b"GNU.sparse.") => return Err(TarError::Malformed("a sparse file")),
            _ => {} // names of owners, further times, extended attributes: nothing of it is kept
        }
    }
    Ok(())
}

/// For all entries that follow: comments only, since anything else would change what each entry means.
fn parse_global(content: &[u8]) -> Result<(), TarError> {
    let harmless = |key: &[u8]| key == b"comment";
    if pax_records(content)?.iter().all(|(key, _)| harmless(key)) {
        Ok(())
    } else {
        Err(TarError::Malformed("a global PAX header"))
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// Seconds with a fraction, which is dropped; negative ones count as 1970.
fn pax_time(text: &[u8]) -> Option<u64> {
    if text.first() == Some(&b'-') {
        return Some(0);
    }
    decimal(text.split(|byte| *byte == b'.').next()?)
}
