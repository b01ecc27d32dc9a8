//! Acting in another network namespace for a while.

use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};

use crate::Result;
use crate::namespace::{self, Kind};

/// While it lives, the calling thread is in another network namespace: sockets that it makes belong there.
/// Dropped, it puts the thread back.
#[derive(Debug)]
pub struct InNetns {
    original: OwnedFd,
    /// A namespace is entered by a thread; the guard must be dropped by the same one.
    not_send: PhantomData<*const ()>,
}

impl InNetns {
    /// Enters the network namespace behind `namespace`.
    pub fn enter(namespace: impl AsFd) -> Result<Self> {
        let original = namespace::of_thread(Kind::Network)?;
        namespace::enter(namespace, Kind::Network)?;
        Ok(Self { original, not_send: PhantomData })
    }
}

impl Drop for InNetns {
    fn drop(&mut self) {
        // It can only fail for want of privileges that the thread had when it entered. To go on in the wrong
        // namespace would be worse than to stop.
        if let Err(error) = namespace::enter(&self.original, Kind::Network) {
            eprintln!("limosa: cannot return to the original network namespace: {error}");
            std::process::abort();
        }
    }
}
