//! Memory for keys: locked, so that it is never swapped out; left out of core dumps; between two pages that nothing may
//! touch; wiped as soon as a key is given up.
//!
//! It is small, because the limit of locked memory (`RLIMIT_MEMLOCK`) may be 64 KiB, and grows by one region at a time.
//! A key that is at work is also, for moments, in registers and on stacks, and with autolock off it is in the key file.

use std::alloc::Layout;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mlock, mmap_anonymous, mprotect};

/// Bytes of one region, a whole number of pages of 4, 16 and 32 KiB.
const REGION_BYTES: usize = 32 << 10;
/// More than a page of any machine, on either side of a region.
const GUARD_BYTES: usize = 64 << 10;
/// What is given out starts at a multiple of this, and is rounded up to one.
const SLOT_BYTES: usize = 32;
const SLOTS: usize = REGION_BYTES / SLOT_BYTES;

static REGIONS: Mutex<Regions> = Mutex::new(Regions(Vec::new()));

/// A value in this memory. Moving it moves the handle alone.
pub struct Unswapped<T>(NonNull<T>);

// SAFETY: it owns its value, as a `Box` does.
#[expect(unsafe_code, reason = "a smart pointer of its own")]
unsafe impl<T: Send> Send for Unswapped<T> {}
// SAFETY: as above; a shared handle gives shared access alone.
#[expect(unsafe_code, reason = "a smart pointer of its own")]
unsafe impl<T: Sync> Sync for Unswapped<T> {}

impl<T> Unswapped<T> {
    /// Takes a value in. What the caller still has of it is the caller's to wipe.
    ///
    /// # Panics
    /// Where the machine has no memory left, as any allocation; for a value of more than 32 KiB, or aligned to more than
    /// 32 bytes.
    pub fn new(value: T) -> Self {
        let at = regions().take(Layout::new::<T>()).cast::<T>();
        // SAFETY: `take` gives memory of this layout that nobody else has.
        #[expect(unsafe_code, reason = "a smart pointer of its own")]
        unsafe {
            at.write(value);
        }
        Self(at)
    }
}

impl<const N: usize> Unswapped<[u8; N]> {
    /// Takes in what this function writes, in place.
    ///
    /// # Errors
    /// Those of the function.
    pub fn filled<E>(fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        let mut bytes = Self::new([0; N]);
        fill(bytes.as_mut_slice())?;
        Ok(bytes)
    }

    /// A copy of these bytes; nothing where they are not `N`.
    pub fn copied(bytes: &[u8]) -> Option<Self> {
        let mut own = Self::new([0; N]);
        (bytes.len() == N).then(|| own.copy_from_slice(bytes))?;
        Some(own)
    }
}

impl<T> Drop for Unswapped<T> {
    fn drop(&mut self) {
        // SAFETY: the value was written by `new`, is dropped once, and its memory goes back after that.
        #[expect(unsafe_code, reason = "a smart pointer of its own")]
        unsafe {
            self.0.drop_in_place();
        }
        regions().give_back(self.0.cast(), Layout::new::<T>());
    }
}

impl<T> Deref for Unswapped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value lives as long as the handle.
        #[expect(unsafe_code, reason = "a smart pointer of its own")]
        unsafe {
            self.0.as_ref()
        }
    }
}

impl<T> DerefMut for Unswapped<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for `deref`, and the handle is borrowed for as long.
        #[expect(unsafe_code, reason = "a smart pointer of its own")]
        unsafe {
            self.0.as_mut()
        }
    }
}

impl<T: Clone> Clone for Unswapped<T> {
    fn clone(&self) -> Self {
        Self::new(T::clone(self))
    }
}

impl<T> fmt::Debug for Unswapped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unswapped(…)")
    }
}

/// Makes the first region, so that a program says at its start, in its log, where memory cannot be locked.
pub fn prepare() {
    let mut regions = regions();
    if regions.0.is_empty() {
        regions.grow();
    }
}

fn regions() -> MutexGuard<'static, Regions> {
    REGIONS.lock().unwrap_or_else(PoisonError::into_inner) // it only panics before it changes anything
}

struct Regions(Vec<Region>);

struct Region {
    start: NonNull<u8>,
    used: [bool; SLOTS],
}

// SAFETY: a region's memory belongs to the process, and is given out under the lock of `REGIONS`.
#[expect(unsafe_code, reason = "it holds an address")]
unsafe impl Send for Region {}

impl Regions {
    fn take(&mut self, layout: Layout) -> NonNull<u8> {
        assert!(
            layout.size() <= REGION_BYTES && layout.align() <= SLOT_BYTES,
            "not a key"
        );
        let slots = slots(layout);
        if let Some(at) = self.0.iter_mut().find_map(|region| region.take(slots)) {
            return at;
        }
        self.grow().take(slots).expect("a new region is empty")
    }

    fn grow(&mut self) -> &mut Region {
        let region = Region::map().expect("memory for keys");
        self.0.push(region);
        self.0.last_mut().expect("just pushed")
    }

    fn give_back(&mut self, at: NonNull<u8>, layout: Layout) {
        let owner = self
            .0
            .iter_mut()
            .find_map(|region| Some((region.slot(at)?, region)));
        let (first, region) = owner.expect("given out by a region");
        for n in 0..layout.size() {
            // SAFETY: `take` gave these bytes to the one who now gives them back. Volatile, so that it is not left out.
            #[expect(unsafe_code, reason = "wiping a value's bytes, whatever its type")]
            unsafe {
                at.add(n).write_volatile(0);
            }
        }
        region.used[first..first + slots(layout)].fill(false);
    }
}

/// How many slots this takes; one at least, so that each value has a place of its own.
fn slots(layout: Layout) -> usize {
    layout.size().div_ceil(SLOT_BYTES).max(1)
}

impl Region {
    fn map() -> rustix::io::Result<Self> {
        let whole = GUARD_BYTES + REGION_BYTES + GUARD_BYTES;
        // SAFETY: a new mapping of nobody's, which is never unmapped; the middle is opened within its bounds.
        #[expect(unsafe_code, reason = "mapping memory")]
        let (start, locked) = unsafe {
            let whole = mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), MapFlags::PRIVATE)?;
            let start = whole.byte_add(GUARD_BYTES);
            mprotect(start, REGION_BYTES, MprotectFlags::READ | MprotectFlags::WRITE)?;
            let locked =
                madvise(start, REGION_BYTES, Advice::LinuxDontDump).and_then(|()| mlock(start, REGION_BYTES));
            (start, locked)
        };
        if let Err(error) = locked {
            tracing::warn!(
                "keys could be written to swap: memory cannot be locked ({error}); raise the limit of locked memory \
                 (`LimitMEMLOCK=`, `ulimit -l`) to more than 64 KiB"
            );
        }
        Ok(Self {
            start: NonNull::new(start.cast()).expect("a mapping is not at address zero"),
            used: [false; SLOTS],
        })
    }

    /// The first run of free slots that is long enough.
    fn take(&mut self, slots: usize) -> Option<NonNull<u8>> {
        let first = self.used.windows(slots).position(|run| !run.contains(&true))?;
        self.used[first..first + slots].fill(true);
        // SAFETY: the slot is inside of the mapping.
        #[expect(unsafe_code, reason = "an address inside of the mapping")]
        Some(unsafe { self.start.add(first * SLOT_BYTES) })
    }

    /// Which slot of this region it is.
    fn slot(&self, at: NonNull<u8>) -> Option<usize> {
        let distance = at.addr().get().checked_sub(self.start.addr().get())?;
        (distance < REGION_BYTES).then_some(distance / SLOT_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// What the kernel says of the mapping that holds this address: its name, its permissions, its flags (proc_pid_smaps(5)).
    fn mapping(address: usize) -> (String, Vec<String>) {
        let smaps = fs::read_to_string("/proc/self/smaps").expect("this process");
        let mut permissions = None;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((start, end)) = first.split_once('-') {
                let bound = |text| usize::from_str_radix(text, 16).expect("an address");
                permissions = (bound(start)..bound(end))
                    .contains(&address)
                    .then(|| words.next().expect("permissions").to_owned());
            } else if let ("VmFlags:", Some(permissions)) = (first, &permissions) {
                return (permissions.clone(), words.map(str::to_owned).collect());
            }
        }
        panic!("no mapping holds {address:x}");
    }

    #[test]
    fn a_value_is_in_locked_memory_between_guards_and_in_no_dump() {
        prepare();
        let key = Unswapped::new([7; 32]);
        let address = std::ptr::from_ref(&*key).addr();
        let (permissions, flags) = mapping(address);
        assert_eq!(permissions, "rw-p");
        for flag in ["lo", "dd"] {
            assert!(flags.iter().any(|it| it == flag), "{flag} is not in {flags:?}");
        }
        let start = address - address % (4 << 10);
        let beside = (1..=8)
            .map(|page| start - page * (4 << 10))
            .find(|page| mapping(*page).0 == "---p");
        assert!(beside.is_some(), "no guard before it");
    }

    #[test]
    fn what_is_given_up_is_wiped_and_the_next_value_may_have_its_place() {
        let mut regions = Regions(Vec::new());
        let layout = Layout::new::<[u8; 100]>();
        let at = regions.take(layout);
        // SAFETY: the region stays mapped, and nobody else has these bytes.
        #[expect(unsafe_code, reason = "looks at what a value left")]
        let left = unsafe {
            at.write_bytes(0xC5, 100);
            regions.give_back(at, layout);
            at.cast::<[u8; 100]>().read()
        };
        assert_eq!(left, [0; 100]);
        assert_eq!(regions.take(layout), at);
    }

    #[test]
    fn a_full_region_is_followed_by_another() {
        let many: Vec<_> = (0..3 * SLOTS).map(|n| Unswapped::new([n; 4])).collect();
        assert!(many.iter().enumerate().all(|(n, value)| **value == [n; 4]));
        assert!(regions().0.len() >= 3);
    }

    #[test]
    fn a_value_is_dropped_once_and_shared_like_any_other() {
        struct Counted(Arc<AtomicUsize>);
        impl Drop for Counted {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(AtomicUsize::new(0));
        let one = Arc::new(Unswapped::new(Counted(count.clone())));
        let other = one.clone();
        std::thread::spawn(move || drop(other)).join().expect("a thread");
        assert_eq!(count.load(Ordering::Relaxed), 0);
        drop(one);
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn bytes_come_in_by_copy_or_in_place_and_never_into_text() {
        assert_eq!(
            *Unswapped::<[u8; 3]>::copied(&[1, 2, 3]).expect("three"),
            [1, 2, 3]
        );
        assert!(Unswapped::<[u8; 3]>::copied(&[1, 2]).is_none());
        let filled = Unswapped::<[u8; 2]>::filled(|bytes| {
            bytes.fill(9);
            Ok::<_, Infallible>(())
        });
        assert_eq!(*filled.expect("infallible"), [9, 9]);
        assert_eq!(
            Unswapped::<[u8; 2]>::filled(|_| Err("no")).expect_err("refused"),
            "no"
        );
        assert_eq!(format!("{:?}", Unswapped::new(42)), "Unswapped(…)");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))] // regions are never unmapped
        #[test]
        fn no_two_values_share_a_byte(steps in prop::collection::vec((1..2_000_usize, any::<bool>()), 1..200)) {
            let mut regions = Regions(Vec::new());
            let mut held: Vec<(usize, Layout)> = Vec::new();
            for (size, gives_back) in steps {
                if let (true, Some((at, layout))) = (gives_back, held.pop()) {
                    regions.give_back(NonNull::new(std::ptr::with_exposed_provenance_mut(at)).expect("an address"), layout);
                    continue;
                }
                let layout = Layout::from_size_align(size, SLOT_BYTES).expect("a layout");
                let at = regions.take(layout).as_ptr().expose_provenance();
                prop_assert_eq!(at % SLOT_BYTES, 0);
                let apart = |&(other, its): &(usize, Layout)| at + size <= other || other + its.size() <= at;
                prop_assert!(held.iter().all(apart));
                held.push((at, layout));
            }
        }
    }
}
