//! Descriptors in flight (`SCM_RIGHTS`): what lies in the queues of a tree's unix sockets, and the descriptions that only
//! such messages have open, because whoever sent them has closed them since.
//!
//! A description that is only in flight is one of the tree's like any other, without a holder. A socket among them has a
//! queue of its own, with further descriptors in it: so the list is gone through until it grows no more, and what is in
//! flight twice, or through itself, is found again.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use limosa_kernel::net::peek::{self, Message};
use limosa_kernel::proc::{FdExtra, ProcDir};
use limosa_kernel::task::{self, Comparison};

use crate::error::CaptureError;
use crate::network;
use crate::view::{DescriptionView, Place};

/// A message that nobody has received.
#[derive(Debug)]
pub(crate) struct Queued {
    /// As the kernel shows it; its descriptors are taken out of it.
    pub(crate) message: Message,
    /// The descriptions that its descriptors refer to, by index.
    pub(crate) rights: Vec<usize>,
}

/// The queues of unix sockets, by index of the description.
pub(crate) type Queues = HashMap<usize, Vec<Queued>>;

/// Reads the queues of all unix sockets of a frozen tree, and adds the descriptions that are only in flight to `found`.
pub(crate) fn gather(found: &mut Vec<DescriptionView>) -> Result<Queues, CaptureError> {
    let mut alike: HashMap<(u64, u64), Vec<usize>> = HashMap::new();
    for (index, view) in found.iter().enumerate() {
        alike.entry((view.stat.st_dev, view.stat.st_ino)).or_default().push(index);
    }
    let mut queues = Queues::new();
    let mut index = 0;
    while index < found.len() {
        if has_queue(&found[index]) {
            let mut queue = Vec::new();
            let messages = peek::receive_queue(found[index].descriptor.as_fd())?;
            refuse_hidden(&found[index], messages.iter().map(|message| message.descriptors.len()).sum())?;
            for mut message in messages {
                let rights = std::mem::take(&mut message.descriptors);
                let rights = rights.into_iter().map(|right| add(right, index, found, &mut alike));
                queue.push(Queued { rights: rights.collect::<Result<_, _>>()?, message });
            }
            queues.insert(index, queue);
        }
        index += 1;
    }
    Ok(queues)
}

/// What [`gather`] would add, as far as a running tree can be asked without its noticing: the descriptors of the first
/// message of each queue that has any. Says whether there are no others. Descriptions may be among `found` several times.
pub(crate) fn glance(found: &mut Vec<DescriptionView>) -> bool {
    let mut alike: HashMap<(u64, u64), Vec<usize>> = HashMap::new();
    for (index, view) in found.iter().enumerate() {
        alike.entry((view.stat.st_dev, view.stat.st_ino)).or_default().push(index);
    }
    let (mut seen, mut index, mut are_all) = (HashSet::new(), 0, true);
    while index < found.len() {
        if has_queue(&found[index]) && seen.insert(found[index].stat.st_ino) {
            let rights = peek::first_descriptors(found[index].descriptor.as_fd()).unwrap_or_default();
            are_all &= in_flight(&found[index]) == Some(rights.len());
            for right in rights {
                if let Err(error) = add(right, index, found, &mut alike) {
                    tracing::debug!(%error, "a descriptor in flight is not looked at");
                    are_all = false;
                }
            }
        }
        index += 1;
    }
    are_all
}

/// How many descriptors the kernel says are in a socket's queue. Of a datagram socket that was connected again it may
/// say too many.
fn in_flight(view: &DescriptionView) -> Option<usize> {
    match view.info.extra {
        FdExtra::UnixSocket { scm_fds } => Some(scm_fds as usize),
        _ => None,
    }
}

/// Refuses a queue that has more descriptors than were seen in it: a packet of length zero looks like its end.
fn refuse_hidden(view: &DescriptionView, seen: usize) -> Result<(), CaptureError> {
    let is_datagram = network::kind(view).is_some_and(|kind| kind.kind == libc::SOCK_DGRAM);
    match in_flight(view) {
        Some(all) if all > seen && !is_datagram => {
            let reason = format!("{all} descriptors are in flight in it, of which {seen} could be seen");
            Err(view.refuse(reason, "let the process receive them, and try again").into())
        }
        _ => Ok(()),
    }
}

/// Whether it is a unix socket that messages can come to.
fn has_queue(view: &DescriptionView) -> bool {
    network::kind(view).is_some_and(|kind| kind.domain == libc::AF_UNIX)
        && !rustix::net::sockopt::socket_acceptconn(&view.descriptor).unwrap_or(false)
}

/// The index of the description that a descriptor in flight refers to, which lies in the queue of another.
fn add(
    right: OwnedFd,
    carrier: usize,
    found: &mut Vec<DescriptionView>,
    alike: &mut HashMap<(u64, u64), Vec<usize>>,
) -> Result<usize, CaptureError> {
    let carrier = &found[carrier];
    let own = std::process::id() as i32;
    let stat = rustix::fs::fstat(&right).map_err(carrier.error("fstat of a descriptor in flight"))?;
    let alike = alike.entry((stat.st_dev, stat.st_ino)).or_default();
    for index in alike.iter() {
        let (a, b) = (right.as_raw_fd() as u64, found[*index].descriptor.as_raw_fd() as u64);
        if task::kcmp(own, own, Comparison::File, a, b)?.is_eq() {
            return Ok(*index);
        }
    }
    let (Place::Held(socket) | Place::InFlight(socket)) = carrier.place;
    let (ours, process) = (ProcDir::open(own)?, carrier.process);
    let (link, info) = (ours.fd_link(right.as_raw_fd())?, ours.fdinfo(right.as_raw_fd())?);
    let view =
        DescriptionView { process, place: Place::InFlight(socket), link, info, descriptor: right, stat };
    alike.push(found.len());
    found.push(view);
    Ok(found.len() - 1)
}
