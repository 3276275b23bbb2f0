//! Which replica takes the next connection: the one with the fewest open, in turn among equals.

use bulkhead_proto::TaskId;

/// A port inside a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Which task.
    pub task: TaskId,
    /// Its port.
    pub port: u16,
}

#[derive(Debug)]
struct Replica {
    backend: Backend,
    open: usize,
    /// When it last took a connection, or failed to, counted in picks.
    last: u64,
}

/// Counts the open connections of each replica.
#[derive(Debug, Default)]
pub struct Balancer {
    replicas: Vec<Replica>,
    picks: u64,
}

impl Balancer {
    /// These are the replicas now. Those that stay keep their counts.
    pub fn set(&mut self, backends: &[Backend]) {
        self.replicas
            .retain(|replica| backends.contains(&replica.backend));
        for &backend in backends {
            if self.find(backend).is_none() {
                self.replicas.push(Replica {
                    backend,
                    open: 0,
                    last: 0,
                });
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.replicas.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.replicas.is_empty()
    }

    /// Takes the next replica for one connection.
    pub fn take(&mut self) -> Option<Backend> {
        self.picks += 1;
        let next = self
            .replicas
            .iter_mut()
            .min_by_key(|replica| (replica.open, replica.last))?;
        next.open += 1;
        next.last = self.picks;
        Some(next.backend)
    }

    /// A connection ended. One of a replica that has left meanwhile counts for nothing.
    pub fn give_back(&mut self, backend: Backend) {
        if let Some(replica) = self.find(backend) {
            replica.open = replica.open.saturating_sub(1);
        }
    }

    /// The replica did not take the connection: among equals it is the last to be asked again.
    pub fn failed(&mut self, backend: Backend) {
        self.picks += 1;
        let now = self.picks;
        if let Some(replica) = self.find(backend) {
            replica.last = now;
        }
    }

    fn find(&mut self, backend: Backend) -> Option<&mut Replica> {
        self.replicas
            .iter_mut()
            .find(|replica| replica.backend == backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backend(n: u8) -> Backend {
        Backend {
            task: TaskId::from_bytes([n; 16]),
            port: 80,
        }
    }

    #[test]
    fn equals_take_turns_and_the_idle_comes_first() {
        let mut balancer = Balancer::default();
        assert_eq!(balancer.take(), None);
        balancer.set(&[backend(1), backend(2), backend(3)]);
        let mut three: Vec<_> = (0..3).filter_map(|_| balancer.take()).collect();
        three.sort();
        assert_eq!(three, [backend(1), backend(2), backend(3)]);
        balancer.give_back(backend(2));
        assert_eq!(balancer.take(), Some(backend(2)));
    }

    #[test]
    fn a_replica_that_stays_keeps_its_count() {
        let mut balancer = Balancer::default();
        balancer.set(&[backend(1)]);
        balancer.take();
        balancer.set(&[backend(1), backend(2)]);
        assert_eq!(balancer.take(), Some(backend(2)));
        balancer.set(&[backend(2)]);
        balancer.give_back(backend(1));
        assert_eq!((balancer.len(), balancer.is_empty()), (1, false));
    }

    proptest! {
        /// While connections only come, no two replicas differ by more than one.
        #[test]
        fn load_is_even(replicas in 1..6u8, connections in 0..50usize) {
            let mut balancer = Balancer::default();
            balancer.set(&(0..replicas).map(backend).collect::<Vec<_>>());
            for _ in 0..connections {
                balancer.take();
            }
            let open: Vec<_> = balancer.replicas.iter().map(|replica| replica.open).collect();
            let spread = open.iter().max().expect("one") - open.iter().min().expect("one");
            prop_assert!(spread <= 1);
        }
    }
}
