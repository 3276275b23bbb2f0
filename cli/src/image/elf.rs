//! Is this file a program that runs alone? Reads the ELF header and the program headers, nothing else.

/// Architectures that images are made for, by ELF machine number (System V ABI, `e_machine`).
const MACHINES: &[(u16, &str)] = &[(62, "amd64"), (183, "arm64")];
const EXECUTABLE: u16 = 2;
const SHARED: u16 = 3; // position-independent programs too
const INTERPRETER: u32 = 3; // PT_INTERP: the program asks for a dynamic linker
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;

/// The OCI architecture of a static 64-bit program, or why it is none.
pub(super) fn static_architecture(file: &[u8]) -> Result<&'static str, &'static str> {
    let header = file
        .get(..HEADER_BYTES)
        .ok_or("it is too short to be a program")?;
    if header[..4] != *b"\x7fELF" {
        return Err("it is not an ELF file; a script needs its interpreter in the image");
    }
    if header[4..6] != [2, 1] {
        return Err("it is not a 64-bit little-endian program");
    }
    if !matches!(half(header, 16), Some(EXECUTABLE | SHARED)) || word64(header, 24) == Some(0) {
        return Err("it is a library or an object file, it has no entry point");
    }
    let machine = half(header, 18);
    let architecture = MACHINES
        .iter()
        .find(|(number, _)| Some(*number) == machine)
        .map(|(_, name)| *name)
        .ok_or("it is for another processor than amd64 or arm64")?;
    let damaged = "its program headers lie outside the file";
    let start = word64(header, 32)
        .and_then(|at| usize::try_from(at).ok())
        .ok_or(damaged)?;
    if half(header, 54).map(usize::from) != Some(PROGRAM_HEADER_BYTES) {
        return Err("its program headers have an unknown size");
    }
    for index in 0..usize::from(half(header, 56).unwrap_or(0)) {
        let at = index
            .checked_mul(PROGRAM_HEADER_BYTES)
            .and_then(|offset| start.checked_add(offset));
        let kind = at
            .and_then(|at| file.get(at..at.checked_add(4)?))
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_le_bytes)
            .ok_or(damaged)?;
        if kind == INTERPRETER {
            return Err("it is dynamically linked: it would not find its libraries in the image");
        }
    }
    Ok(architecture)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The smallest file that passes, with program headers of these kinds.
    pub(in crate::image) fn program(kinds: &[u32]) -> Vec<u8> {
        let mut file = vec![0; HEADER_BYTES];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16] = 2;
        file[18] = 62;
        file[24] = 1;
        file[32] = 64;
        file[54] = 56;
        file[56] = u8::try_from(kinds.len()).expect("a handful");
        for kind in kinds {
            file.extend(kind.to_le_bytes());
            file.extend([0; PROGRAM_HEADER_BYTES - 4]);
        }
        file
    }

    #[test]
    fn only_static_programs_pass() {
        assert_eq!(static_architecture(&program(&[1, 1])), Ok("amd64"));
        let with = |at: usize, byte: u8| {
            let mut file = program(&[1]);
            file[at] = byte;
            file
        };
        for bad in [
            Vec::new(),
            b"#!/bin/sh\n".repeat(10),
            program(&[1, INTERPRETER]),
            with(4, 1),    // 32 bits
            with(16, 1),   // object file
            with(18, 3),   // i386
            with(24, 0),   // no entry
            with(39, 255), // headers far outside
            with(56, 9),   // more headers than the file holds
        ] {
            assert!(static_architecture(&bad).is_err());
        }
    }
}
