//! Who is who: what stands so far are join tickets.

pub mod ticket;
