//! Sets of watched descriptors (epoll(7)).
//!
//! An entry's key is a file and the number under which it was added. So the process that holds the epoll adds the
//! entries itself, once all its descriptors are in place. The number may have been closed or used again since; then
//! the file takes it for a moment, through another descriptor that the process has of it.
//!
//! An entry with `EPOLLET` whose file is ready is reported once more after a restore, and a one-shot entry that has
//! fired waits for errors and hang-ups, which the kernel adds to any entry: both may happen to a program anyway.

use std::os::fd::OwnedFd;

use limosa_kernel::proc::{EpollEntry, FdExtra};
use limosa_kernel::task;
use limosa_puppet::Program;
use rustix::event::epoll::{CreateFlags, create};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, Holder, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

const EPOLL_CTL_ADD: i32 = 1;

/// An epoll.
#[derive(Debug, Serialize, Deserialize)]
pub struct Epoll {
    /// What it watches.
    pub entries: Vec<Entry>,
}

/// A watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Number under which it was added.
    pub number: i32,
    /// Index of the watched description.
    pub description: usize,
    /// `EPOLL*`
    pub events: u32,
    /// The user's data.
    pub data: u64,
}

impl DescriptorKind for Epoll {
    fn recognise(view: &DescriptionView) -> bool {
        view.link == b"anon_inode:[eventpoll]"
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        // Entries are files together with numbers of a process.
        if view.number().is_none() && matches!(&view.info.extra, FdExtra::Epoll(entries) if !entries.is_empty()) {
            let reason = "it is only in flight, so that no process has the descriptors that it watches";
            return Err(view.refuse(reason, "let the process receive it, and try again").into());
        }
        let watched: &[EpollEntry] = match &view.info.extra {
            FdExtra::Epoll(entries) => entries,
            _ => &[],
        };
        let mut entries = Vec::with_capacity(watched.len());
        for (index, entry) in watched.iter().enumerate() {
            let skip = watched[..index].iter().filter(|earlier| earlier.fd == entry.fd).count();
            let description = find(view, entry, skip as u32, context)?;
            entries.push(Entry { number: entry.fd, description, events: entry.events, data: entry.data });
        }
        Ok(Self { entries })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        Self::capture(view, context).map(drop)
    }

    fn rebuild(&self, _: u32, _: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        create(CreateFlags::CLOEXEC).map_err(RestoreError::rebuild("epoll", "epoll_create1"))
    }

    fn complete(&self, holder: &Holder, program: &mut Program) {
        for entry in &self.entries {
            add(entry, holder, program);
        }
    }
}

/// The description that an entry watches. It must be open in the process that will add it again.
fn find(
    view: &DescriptionView,
    entry: &EpollEntry,
    skip: u32,
    context: &CaptureContext,
) -> Result<usize, CaptureError> {
    let (pid, number) = view.handle();
    let owner = (pid, number as i32);
    let is_watched = |index: usize, number: i32| -> Result<bool, CaptureError> {
        let same_file = context.descriptions[index].stat.st_ino == entry.ino;
        Ok(same_file && task::kcmp_epoll((view.process.pid, number), owner, entry.fd, skip)?)
    };
    let own_pid = view.process.own_pid;
    if let Some(index) = context.descriptors.get(&(own_pid, entry.fd))
        && is_watched(*index, entry.fd)?
    {
        return Ok(*index);
    }
    for ((_, number), index) in context.descriptors.iter().filter(|((pid, _), _)| *pid == own_pid) {
        if is_watched(*index, *number)? {
            return Ok(*index);
        }
    }
    let reason = format!(
        "it watches a file that was added as descriptor {} and is no longer open in the process",
        entry.fd
    );
    Err(view.refuse(reason, "remove it from the epoll (EPOLL_CTL_DEL) before closing it").into())
}

/// Adds the calls that add an entry.
fn add(entry: &Entry, holder: &Holder, program: &mut Program) {
    let at_number = holder.descriptors.iter().find(|descriptor| descriptor.number == entry.number);
    if at_number.is_some_and(|descriptor| descriptor.description == entry.description) {
        control(entry, holder.number, program);
        return;
    }
    // A checkpoint of ours has one (see `find`); in another the call below fails and says so.
    let elsewhere = holder.descriptors.iter().find(|descriptor| descriptor.description == entry.description);
    let source = elsewhere.map_or(-1, |descriptor| descriptor.number);
    let free = holder.descriptors.last().map_or(0, |descriptor| descriptor.number + 1);
    let arguments = [holder.number.into(), libc::F_DUPFD_CLOEXEC.into(), free.into()];
    // The epoll itself may have that number: it is used through a number of its own meanwhile.
    let epoll = program.call("use an epoll under another number", libc::SYS_fcntl, arguments);
    let arguments = [source.into(), entry.number.into()];
    match at_number {
        None => {
            program.call("put a watched file under its former number", libc::SYS_dup2, arguments);
            control(entry, epoll, program);
            program.call("close that number", libc::SYS_close, [entry.number.into()]);
        }
        Some(descriptor) => {
            let keep = [entry.number.into(), libc::F_DUPFD_CLOEXEC.into(), free.into()];
            let kept = program.call("keep a descriptor", libc::SYS_fcntl, keep);
            program.call("put a watched file under its former number", libc::SYS_dup2, arguments);
            control(entry, epoll, program);
            let flag = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
            let back = [kept.into(), entry.number.into(), flag.into()];
            program.call("put the descriptor back", libc::SYS_dup3, back);
            program.call("close its temporary number", libc::SYS_close, [kept.into()]);
        }
    }
    program.call("close the epoll's temporary number", libc::SYS_close, [epoll.into()]);
}

fn control(entry: &Entry, epoll: impl Into<limosa_puppet::Arg>, program: &mut Program) {
    // struct epoll_event is packed on x86-64: 32-bit events, 64-bit data.
    let mut event = entry.events.to_le_bytes().to_vec();
    event.extend(entry.data.to_le_bytes());
    let event = program.bytes(&event);
    let arguments = [epoll.into(), EPOLL_CTL_ADD.into(), entry.number.into(), event.into()];
    program.call("watch a descriptor", libc::SYS_epoll_ctl, arguments);
}
