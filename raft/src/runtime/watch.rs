//! A watch channel that wakes its receivers in the order in which they began to wait.
//!
//! Tokio's spreads receivers over several lists at random, so two runs of one simulation would wake them in different
//! orders. The value, its version and its end stay tokio's; only the waiting is done here.

use std::sync::Arc;

use futures::FutureExt as _;
use openraft::async_runtime::watch::{RecvError, SendError, Watch, WatchReceiver, WatchSender};
use tokio::sync::{Notify, watch};

/// The kind of channel.
#[derive(Debug)]
pub struct OrderedWatch;

/// Wakes whoever waits when the last sender went. Declared after the sender: by then that is gone.
#[derive(Clone)]
struct WakeAtEnd(Arc<Notify>);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.notify_waiters();
    }
}

/// Sets the value.
pub struct Sender<T> {
    value: watch::Sender<T>,
    wake: WakeAtEnd,
}

/// Sees the value, and waits for the next.
pub struct Receiver<T> {
    value: watch::Receiver<T>,
    wake: Arc<Notify>,
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sender")
    }
}

impl<T> std::fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Receiver")
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            wake: self.wake.clone(),
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            wake: self.wake.clone(),
        }
    }
}

impl Watch for OrderedWatch {
    type Sender<T: Send + Sync> = Sender<T>;
    type Receiver<T: Send + Sync> = Receiver<T>;
    type Ref<'a, T: Send + 'a> = watch::Ref<'a, T>;

    fn channel<T: Send + Sync>(init: T) -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = watch::channel(init);
        let wake = Arc::new(Notify::new());
        let sender = Sender {
            value: sender,
            wake: WakeAtEnd(wake.clone()),
        };
        (
            sender,
            Receiver {
                value: receiver,
                wake,
            },
        )
    }
}

impl<T: Send + Sync> Sender<T> {
    /// With this value first, and nobody who looks yet.
    pub fn new(init: T) -> Self {
        OrderedWatch::channel(init).0
    }

    /// One more who looks.
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver {
            value: self.value.subscribe(),
            wake: self.wake.0.clone(),
        }
    }

    /// Changes the value where `modify` says that it did.
    pub fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
        let modified = self.value.send_if_modified(modify);
        if modified {
            self.wake.0.notify_waiters();
        }
        modified
    }

    /// Sets the value, whoever looks; gives the one before.
    pub fn send_replace(&self, value: T) -> T {
        let before = self.value.send_replace(value);
        self.wake.0.notify_waiters();
        before
    }
}

impl<T: Send + Sync> Receiver<T> {
    /// The value now.
    pub fn borrow(&self) -> watch::Ref<'_, T> {
        self.value.borrow()
    }

    /// Waits for the next value.
    ///
    /// # Errors
    /// Where the last sender went.
    pub async fn changed(&mut self) -> Result<(), RecvError> {
        loop {
            // Listening before looking, so that a value that comes in between wakes us.
            let wake = self.wake.clone();
            let mut woken = std::pin::pin!(wake.notified());
            woken.as_mut().enable();
            // Unconstrained: with tokio's budget used up it would say "not yet" to a value that is there, and ask to be
            // polled again through a waker that nobody holds.
            let changed = tokio::task::coop::unconstrained(self.value.changed());
            if let Some(changed) = changed.now_or_never() {
                return changed.map_err(|_| RecvError(()));
            }
            woken.await;
        }
    }

    /// The value now, which is then seen.
    pub fn borrow_and_update(&mut self) -> watch::Ref<'_, T> {
        self.value.borrow_and_update()
    }

    /// Waits until the value is one for which `fits` holds; the value that is there counts.
    ///
    /// # Errors
    /// Where the last sender went before.
    pub async fn wait_for(&mut self, mut fits: impl FnMut(&T) -> bool) -> Result<(), RecvError> {
        while !fits(&self.value.borrow_and_update()) {
            self.changed().await?;
        }
        Ok(())
    }
}

impl<T: Send + Sync> WatchSender<OrderedWatch, T> for Sender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        let sent = self.value.send(value).map_err(|error| SendError(error.0));
        self.wake.0.notify_waiters();
        sent
    }

    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        Sender::send_if_modified(self, modify)
    }

    fn borrow_watched(&self) -> watch::Ref<'_, T> {
        self.value.borrow()
    }

    fn subscribe(&self) -> Receiver<T> {
        Sender::subscribe(self)
    }
}

impl<T: Send + Sync> WatchReceiver<OrderedWatch, T> for Receiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        Receiver::changed(self).await
    }

    fn borrow_watched(&self) -> watch::Ref<'_, T> {
        self.value.borrow()
    }

    fn borrow_and_update(&mut self) -> watch::Ref<'_, T> {
        self.value.borrow_and_update()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn receivers_wake_in_the_order_in_which_they_wait() {
        for _ in 0..20 {
            let (sender, receiver) = OrderedWatch::channel(0);
            let order = Arc::new(Mutex::new(Vec::new()));
            let waiting = (0..16).map(|n| {
                let (mut receiver, order) = (receiver.clone(), order.clone());
                tokio::spawn(async move {
                    receiver.changed().await.expect("a value comes");
                    order
                        .lock()
                        .expect("nobody panics")
                        .push((n, *receiver.borrow_watched()));
                    receiver.changed().await.expect_err("the sender goes");
                })
            });
            let waiting: Vec<_> = waiting.collect();
            tokio::task::yield_now().await;
            sender.send(7).expect("there are receivers");
            tokio::task::yield_now().await;
            let expected: Vec<_> = (0..16).map(|n| (n, 7)).collect();
            assert_eq!(*order.lock().expect("nobody panics"), expected);
            drop(sender);
            for task in waiting {
                task.await.expect("it does not panic");
            }
        }
    }

    #[tokio::test]
    async fn a_value_is_seen_however_much_the_task_did_before() {
        let (sender, mut receiver) = OrderedWatch::channel(0);
        // Many times what a task may do before tokio wants it to yield.
        for n in 1..=1_000 {
            sender.send(n).expect("there is a receiver");
            let seen = receiver.changed().now_or_never();
            assert_eq!(seen, Some(Ok(())), "value {n}");
        }
    }

    #[tokio::test]
    async fn the_last_value_is_seen_after_its_sender_went() {
        let (sender, mut receiver) = OrderedWatch::channel(0);
        let other = sender.clone();
        sender.send(1).expect("there is a receiver");
        drop(sender);
        assert_eq!(receiver.changed().await, Ok(()));
        assert!(
            receiver.changed().now_or_never().is_none(),
            "another sender is left"
        );
        drop(other);
        assert_eq!(receiver.changed().await, Err(RecvError(())));
        let (sender, receiver) = OrderedWatch::channel(0);
        assert!(!sender.send_if_modified(|_| false));
        drop(receiver);
        assert!(sender.send(2).is_err());
    }
}
