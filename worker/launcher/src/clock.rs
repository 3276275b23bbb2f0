//! The launcher's clocks. It decides nothing by wall time; it only stamps records and logs with it.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Time since 1970.
pub(crate) fn wall() -> Duration {
    read(ClockId::Realtime)
}

/// Time since the boot, for deadlines.
pub(crate) fn monotonic() -> Duration {
    read(ClockId::Monotonic)
}

/// Milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    u64::try_from(wall().as_millis()).unwrap_or(u64::MAX)
}

fn read(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}
