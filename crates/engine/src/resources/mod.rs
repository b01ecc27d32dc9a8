//! The rooms: one for each kind of kernel object.
//!
//! A room says what its object *is* in a checkpoint (a serde type), how it is captured and how it is rebuilt.
//! Five kinds of rooms, each with a trait, each registered by one line below:
//!
//! - [`ProcessAttribute`]: what every process has one of (signal handlers, limits, …);
//! - [`LateAttribute`]: what every process has one of and is set when its threads exist (limits, timers, …);
//! - [`ThreadAttribute`]: what every thread has one of (registers, credentials, …);
//! - [`DescriptorKind`]: what a descriptor can refer to (a file, a pipe, a socket, …);
//! - [`Namespace`](namespaces::Namespace): what a container has of its own (host name, network, mounts, …).
//!
//! Attributes take part in programs: `ask` adds questions to the one program that a frozen thread runs at
//! checkpoint, `capture` reads the answers, `rebuild` adds calls to the one program that the puppet runs at
//! restore. The order of the lines below is the order in which attributes are rebuilt.

use std::os::fd::OwnedFd;

use limosa_puppet::{Outcome, Program};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, RestoreError};
use crate::view::{DescriptionView, ProcessView, ThreadView};

pub(crate) mod context;
pub mod file_locks;
pub(crate) mod job_control;
pub mod keyrings;
pub(crate) mod landlock;
pub mod mapping;
pub mod namespaces;
mod paths;
pub mod processor;
pub mod segments;
pub mod shared_memory;
pub mod vdso;

pub use context::{CaptureContext, Holder, RebuildContext};
pub use namespaces::NamespaceState;

/// Something that every process has one of.
pub trait ProcessAttribute: Sized {
    /// Where the answers to its questions will be.
    type Asked;

    /// Adds what only the process itself can tell to `program`, which its leader will run.
    fn ask(process: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError>;

    /// The state, from the answers and from what can be seen from outside.
    fn capture(process: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError>;

    /// Adds the calls that give a puppet this state. The puppet still has all privileges, blocks all signals,
    /// and has its final mappings and descriptors.
    fn rebuild(&self, program: &mut Program);
}

/// Something that every process has one of and that is given back when its threads exist.
pub trait LateAttribute: Sized {
    /// Where the answers to its questions will be.
    type Asked;

    /// Adds what only the process itself can tell to `program`, which its leader will run.
    fn ask(process: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError>;

    /// The state, from the answers and from what can be seen from outside.
    fn capture(process: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError>;

    /// Adds the calls that give a puppet this state. All its threads exist; its leader has all privileges yet.
    fn rebuild(&self, program: &mut Program);

    /// Sets from outside what no system call of the process can set; it is stopped, and nothing of ours runs in it
    /// any more.
    fn finish(&self, pid: i32) -> Result<(), RestoreError>;
}

/// Something that every thread has one of.
pub trait ThreadAttribute: Sized {
    /// Where the answers to its questions will be.
    type Asked;

    /// Adds what only the thread itself can tell to `program`, which it will run.
    fn ask(thread: &ThreadView, program: &mut Program) -> Result<Self::Asked, CaptureError>;

    /// The state, from the answers and from what can be seen from outside.
    fn capture(thread: &ThreadView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError>;

    /// Adds the calls that give a puppet thread this state.
    fn rebuild(&self, program: &mut Program);

    /// Sets by ptrace what no system call of the thread can set; the thread is stopped, its address space is
    /// final, and nothing of ours runs in it any more.
    fn finish(&self, tid: i32) -> Result<(), RestoreError>;
}

/// A kind of object that a descriptor can refer to.
pub trait DescriptorKind: Sized {
    /// Whether this is one.
    fn recognise(view: &DescriptionView) -> bool;

    /// Its state; typed refusals for what cannot be carried.
    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError>;

    /// The refusal that [`Self::capture`] would give, as far as it can be known while the processes run, and without doing
    /// anything to the object that they could notice: no queue is read.
    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError>;

    /// A new description in that state, in Limosa itself.
    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError>;

    /// Adds what must be done by a process that holds the description: the first one, when all its descriptors are in
    /// place.
    fn complete(&self, _: &Holder, _: &mut Program) {}
}

macro_rules! attributes {
    ($state:ident, $questions:ident, $view:ident, $trait:ident, { $($(#[$meta:meta])* $room:ident: $type:ty,)* }) => {
        $(pub mod $room;)*

        /// All attributes together; a field for each room.
        #[derive(Debug, Serialize, Deserialize)]
        pub struct $state {
            $($(#[$meta])* pub $room: $type,)*
        }

        /// Where the answers to all questions will be.
        pub struct $questions {
            $($room: <$type as $trait>::Asked,)*
        }

        impl $state {
            /// Adds every room's questions to `program`.
            pub fn ask(view: &$view, program: &mut Program) -> Result<$questions, CaptureError> {
                Ok($questions { $($room: <$type as $trait>::ask(view, program)?,)* })
            }

            /// Every room's state.
            pub fn capture(view: &$view, asked: &$questions, outcome: &Outcome) -> Result<Self, CaptureError> {
                Ok(Self { $($room: <$type as $trait>::capture(view, &asked.$room, outcome)?,)* })
            }

            /// Adds every room's calls to `program`.
            pub fn rebuild(&self, program: &mut Program) {
                $(self.$room.rebuild(program);)*
            }
        }
    };
}

macro_rules! finish_all {
    ($state:ident: $($room:ident)*) => {
        impl $state {
            /// Every room's last touch, from outside.
            pub fn finish(&self, id: i32) -> Result<(), RestoreError> {
                $(self.$room.finish(id)?;)*
                Ok(())
            }
        }
    };
}

macro_rules! descriptor_kinds {
    ($($room:ident: $variant:ident($type:ty),)*) => {
        $(pub mod $room;)*

        /// What an open file description refers to.
        #[derive(Debug, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum DescriptorState {
            $(#[doc = concat!("See [`", stringify!($room), "`].")] $variant($type),)*
        }

        impl DescriptorState {
            /// Captures the description by the first room that recognises it.
            pub fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
                $(if <$type as DescriptorKind>::recognise(view) {
                    return <$type as DescriptorKind>::capture(view, context).map(Self::$variant);
                })*
                Err(unknown(view))
            }

            /// Has the first room that recognises the description say what it would refuse.
            pub(crate) fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
                $(if <$type as DescriptorKind>::recognise(view) {
                    return <$type as DescriptorKind>::examine(view, context);
                })*
                Err(unknown(view))
            }

            /// Rebuilds it by its room.
            pub fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
                match self {
                    $(Self::$variant(state) => state.rebuild(flags, context),)*
                }
            }

            /// Adds what its first holder must do.
            pub(crate) fn complete(&self, holder: &Holder, program: &mut Program) {
                match self {
                    $(Self::$variant(state) => state.complete(holder, program),)*
                }
            }

            /// The descriptions that are in flight in it, by index.
            pub(crate) fn in_flight(&self) -> impl Iterator<Item = usize> {
                let queue = match self {
                    Self::UnixSocket(socket) => socket.queue.as_slice(),
                    _ => &[],
                };
                queue.iter().flat_map(|message| message.rights.iter().copied())
            }

            /// The room's name.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => stringify!($room),)*
                }
            }
        }
    };
}

fn unknown(view: &DescriptionView) -> CaptureError {
    view.refuse("no room of Limosa's recognises it", "close it before the checkpoint").into()
}

attributes! {
    ProcessState, ProcessQuestions, ProcessView, ProcessAttribute, {
        /// Layout of the address space that is not mappings.
        address_space: address_space::AddressSpace,
        /// Working directory, root, umask.
        filesystem: filesystem::Filesystem,
        /// Dispositions of signals.
        signal_handlers: signal_handlers::SignalHandlers,
        /// Switches that prctl(2) and personality(2) set.
        prctl_state: prctl_state::Switches,
        /// Keys of pkeys(7).
        #[serde(default)]
        protection_keys: protection_keys::ProtectionKeys,
    }
}

attributes! {
    LateState, LateQuestions, ProcessView, LateAttribute, {
        /// What happens to its memory in an emergency.
        memory_policy: memory_policy::MemoryPolicy,
        /// Timers of timer_create(2).
        posix_timers: posix_timers::PosixTimers,
        /// Timers of setitimer(2).
        itimers: itimers::IntervalTimers,
        /// Limits on resources; after all that they could hinder.
        limits: limits::Limits,
    }
}
finish_all! { LateState: memory_policy posix_timers itimers limits }

attributes! {
    ThreadState, ThreadQuestions, ThreadView, ThreadAttribute, {
        /// General-purpose and extended registers.
        registers: registers::ThreadRegisters,
        /// Addresses that the kernel keeps for the thread.
        pointers: pointers::Pointers,
        /// Blocked and pending signals, alternate stack.
        signals: signals::Signals,
        /// The name.
        name: name::Name,
        /// Policy, processors, priorities.
        scheduling: scheduling::Scheduling,
        /// User, groups, capabilities.
        credentials: credentials::Credentials,
        /// System-call filters.
        seccomp: seccomp::Seccomp,
    }
}
finish_all! { ThreadState: registers pointers signals name scheduling credentials seccomp }

descriptor_kinds! {
    eventfd: EventFd(eventfd::EventFd),
    epoll: Epoll(epoll::Epoll),
    timerfd: TimerFd(timerfd::TimerFd),
    signalfd: SignalFd(signalfd::SignalFd),
    inotify: Inotify(inotify::Inotify),
    memfd: Memfd(memfd::Memfd),
    pidfd: PidFd(pidfd::PidFd),
    message_queue: MessageQueue(message_queue::MessageQueue),
    tcp: Tcp(tcp::Tcp),
    udp: Udp(udp::Udp),
    unix_socket: UnixSocket(unix_socket::UnixSocket),
    netlink: Netlink(netlink::Netlink),
    other_socket: OtherSocket(other_socket::OtherSocket),
    terminal: Terminal(terminal::TerminalEnd),
    pipe: Pipe(pipe::Pipe),
    file: File(file::File),
    other_file: OtherFile(other_file::OtherFile),
}
