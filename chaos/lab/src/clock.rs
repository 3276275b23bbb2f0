//! A process whose wall clock is wrong, while the machine's and everybody else's are right.
//!
//! Programs read the time through the vDSO, a page of the kernel's that is mapped into each of them (`vdso(7)`). In one
//! process its functions are written over, through `/proc/PID/mem`: the new ones ask the kernel and add an offset to the wall
//! clock. Monotonic time is left alone, as it is by a wrong clock. What a process starts has right clocks again. A system
//! call that goes past the vDSO sees the right time.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::thread::yield_now;

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::Signal;
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSymbol as _};

use crate::machine::send;

/// More than a vDSO has.
const MOST: u64 = 1 << 20;
/// How often a process is looked at again that is just reading the time.
const TRIES: usize = 1_000;

/// Has a process's wall clock differ from the machine's by so many seconds; 0 takes that back. Whether anything changed.
///
/// # Errors
/// The process is gone, or is not this user's to change; the machine is not of a kind whose code is known here.
pub fn set(pid: u32, offset: i32) -> anyhow::Result<bool> {
    let wanted = patches(offset)?;
    let Some(start) = mapped(pid)?.map(|(start, _)| start) else {
        return Ok(false); // it has no vDSO: it is ending, or a thread of the kernel
    };
    let path = format!("/proc/{pid}/mem");
    let memory = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("could not open {path}"))?;
    let mut differing = Vec::new();
    for piece in wanted {
        let mut present = vec![0; piece.code.len()];
        memory.read_exact_at(&mut present, start + piece.at)?;
        if present != piece.code {
            differing.push(piece);
        }
    }
    if differing.is_empty() {
        return Ok(false);
    }
    let _still = Still::hold(pid, start, &differing)?;
    for piece in differing {
        memory
            .write_all_at(&piece.code, start + piece.at)
            .with_context(|| format!("could not write to {path}"))?;
    }
    Ok(true)
}

/// A process that stands still, with none of its threads inside what is about to change; it goes on when this goes.
struct Still(u32);

impl Still {
    fn hold(pid: u32, start: u64, pieces: &[Piece]) -> anyhow::Result<Self> {
        let still = Self(pid);
        for _ in 0..TRIES {
            send(pid, Signal::SIGSTOP);
            for _ in 0..TRIES {
                match inside(pid, start, pieces)? {
                    Some(false) => return Ok(still),
                    Some(true) => break,
                    None => yield_now(),
                }
            }
            send(pid, Signal::SIGCONT);
            yield_now();
        }
        bail!("process {pid} cannot be made to stand still")
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        send(self.0, Signal::SIGCONT);
    }
}

/// Whether a thread of a process stands inside one of these functions; nothing while one still runs
/// (`proc_pid_syscall(5)`: the last word is where it stands).
fn inside(pid: u32, start: u64, pieces: &[Piece]) -> anyhow::Result<Option<bool>> {
    let mut any = false;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let Ok(line) = fs::read_to_string(thread.path().join("syscall")) else {
            continue; // it ended
        };
        let Some((_, at)) = line.trim().rsplit_once(" 0x") else {
            return Ok(None);
        };
        let at = u64::from_str_radix(at, 16).context("an unknown form of /proc/PID/syscall")?;
        any |= pieces
            .iter()
            .any(|it| (start + it.at..start + it.at + it.bytes).contains(&at));
    }
    Ok(Some(any))
}

/// Whether clocks can be set wrong on this machine.
///
/// # Errors
/// Why not.
pub fn possible() -> anyhow::Result<()> {
    patches(0).map(drop)
}

/// Where a process has its vDSO: first byte, and the one after the last.
fn mapped(pid: u32) -> anyhow::Result<Option<(u64, u64)>> {
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
    Ok(parse_maps(&maps))
}

fn parse_maps(maps: &str) -> Option<(u64, u64)> {
    let line = maps.lines().find(|line| line.ends_with("[vdso]"))?;
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

/// This process's own vDSO, which is everybody's and never changed.
fn image() -> anyhow::Result<Vec<u8>> {
    let (start, end) = mapped(std::process::id())?.context("this kernel has no vDSO")?;
    ensure!(end - start <= MOST, "this kernel's vDSO is of an unknown kind");
    let mut image = vec![0; usize::try_from(end - start)?];
    File::open("/proc/self/mem")?.read_exact_at(&mut image, start)?;
    Ok(image)
}

/// A function that is written over: its name, and what it is then.
type Patch = (&'static str, fn([u8; 4]) -> Vec<u8>);

/// The functions of the vDSO that tell the wall clock. Each asks the kernel by the system call of its name, whose arguments
/// are where the function's own are, and adds to the seconds.
#[cfg(target_arch = "x86_64")]
const PATCHES: &[Patch] = &[
    ("__vdso_clock_gettime", |offset| {
        let mut code = vec![
            0xb8, 0xe4, 0, 0, 0, // mov eax, SYS_clock_gettime
            0x0f, 0x05, // syscall
            0x85, 0xff, // test edi, edi (CLOCK_REALTIME)
            0x74, 0x05, // je the addition
            0x83, 0xff, 0x05, // cmp edi, CLOCK_REALTIME_COARSE
            0x75, 0x07, // jne the end
            0x48, 0x81, 0x06, // add qword [rsi], offset
        ];
        code.extend(offset);
        code.push(0xc3); // ret
        code
    }),
    ("__vdso_gettimeofday", |offset| {
        let mut code = vec![
            0xb8, 0x60, 0, 0, 0, // mov eax, SYS_gettimeofday
            0x0f, 0x05, // syscall
            0x48, 0x85, 0xff, // test rdi, rdi
            0x74, 0x07, // je the end
            0x48, 0x81, 0x07, // add qword [rdi], offset
        ];
        code.extend(offset);
        code.push(0xc3);
        code
    }),
    ("__vdso_time", |offset| {
        let mut code = vec![
            0xb8, 0xc9, 0, 0, 0, // mov eax, SYS_time
            0x0f, 0x05, // syscall
            0x48, 0x05, // add rax, offset
        ];
        code.extend(offset);
        code.extend([
            0x48, 0x85, 0xff, // test rdi, rdi
            0x74, 0x03, // je the end
            0x48, 0x89, 0x07, // mov [rdi], rax
            0xc3,
        ]);
        code
    }),
];

#[cfg(not(target_arch = "x86_64"))]
const PATCHES: &[Patch] = &[];

/// A function of the vDSO: where it is and how long, from the vDSO's first byte on, and what it shall begin with.
struct Piece {
    at: u64,
    bytes: u64,
    code: Vec<u8>,
}

/// What has to stand where in the vDSO for this offset.
fn patches(offset: i32) -> anyhow::Result<Vec<Piece>> {
    if PATCHES.is_empty() {
        bail!("a wrong clock is possible on x86-64 alone");
    }
    let image = image()?;
    let file = ElfFile64::<Endianness>::parse(&*image).context("this kernel's vDSO cannot be read")?;
    let mut patches = Vec::new();
    for (name, code) in PATCHES {
        let symbol = file.dynamic_symbols().find(|it| it.name() == Ok(name));
        let symbol = symbol.with_context(|| format!("this kernel's vDSO has no {name}"))?;
        let code = code(offset.to_le_bytes());
        ensure!(
            code.len() as u64 <= symbol.size(),
            "{name} of this kernel's vDSO is too short to be replaced"
        );
        let at = usize::try_from(symbol.address())?;
        let own = image.get(at..at + code.len());
        let own = own.context("this kernel's vDSO cannot be read")?.to_vec();
        patches.push(Piece {
            at: symbol.address(),
            bytes: symbol.size(),
            code: if offset == 0 { own } else { code },
        });
    }
    Ok(patches)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::testing::Shell;

    #[test]
    fn the_vdso_is_found_among_the_mappings() {
        let maps = "7ff0-7ff8 r--p 0 00:00 0 [vvar]\n7ff8-7ffa r-xp 0 00:00 0 [vdso]\n";
        assert_eq!(parse_maps(maps), Some((0x7ff8, 0x7ffa)));
        assert_eq!(parse_maps("7ff0-7ff8 r--p 0 00:00 0 [vvar]\n"), None);
    }

    /// Bash tells the time by all three functions, one after the other, depending on its version; `date` by the first.
    #[test]
    fn a_process_has_a_wrong_clock_and_a_right_one_again() {
        let mut shell = Shell::that_does("printf '%(%s)T\\n' -1");
        let pid = shell.pid();
        let mut difference =
            || shell.ask().parse::<i64>().expect("seconds") - jiff::Timestamp::now().as_second();
        // It must be up before its memory is looked at, and a second may pass between the two clocks.
        assert!(difference().abs() <= 1);
        for offset in [3_600, -864_000, 8_640_000] {
            assert!(set(pid, offset).expect("allowed"));
            assert!(!set(pid, offset).expect("allowed"), "nothing changes twice");
            assert!((difference() - i64::from(offset)).abs() <= 1);
        }
        assert!(set(pid, 0).expect("allowed"));
        assert!(difference().abs() <= 1);
    }
}
