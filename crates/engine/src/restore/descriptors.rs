//! Descriptions are rebuilt once, in Limosa, and then given to every process that holds a descriptor of them.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use std::path::PathBuf;

use limosa_image::Checkpoint;
use limosa_puppet::{Data, Program};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::Makers;
use crate::error::RestoreError;
use crate::network::Starters;
use crate::resources::mapping::{Backing, MappedFile};
use crate::resources::terminal::Rebuilt;
use crate::resources::{DescriptorState, RebuildContext, unix_socket};
use crate::state::{Descriptor, Tree};

/// Most descriptors that one message carries (`SCM_MAX_FD`).
pub(crate) const BATCH: usize = 253;
const MSG_CMSG_CLOEXEC: i32 = 0x4000_0000;

/// What processes will be given.
pub(crate) struct Objects {
    /// By index of the description.
    pub(crate) descriptions: Vec<OwnedFd>,
    /// By index of the shared object.
    pub(crate) shared: Vec<OwnedFd>,
    /// What has to be done when the tree starts.
    pub(crate) starters: Starters,
    /// Descriptions that a process has already.
    pub(crate) held: HashSet<usize>,
    files: HashMap<(Vec<u8>, bool), OwnedFd>,
    root: OwnedFd,
}

/// Rebuilds all shared objects and descriptions.
pub(crate) fn rebuild_all(
    tree: &Tree,
    checkpoint: &Checkpoint,
    root: OwnedFd,
    externals: &HashMap<String, PathBuf>,
    terminals: &[Rebuilt],
    ipc: BorrowedFd,
    makers: &mut Makers<'_>,
) -> Result<Objects, RestoreError> {
    let shared = rebuild_shared(tree, checkpoint, root.as_fd(), ipc)?;
    let own_root = root.try_clone().map_err(|source| RestoreError::Rebuild {
        object: "the root directory".into(),
        step: "dup",
        source,
    })?;
    let pids = makers.pids();
    let mut context = RebuildContext::new(checkpoint, root, &shared, terminals, externals, &pids, ipc);
    let mut descriptions = Vec::with_capacity(tree.descriptions.len());
    for description in &tree.descriptions {
        let descriptor = description.state.rebuild(description.flags, &mut context)?;
        set_status(&descriptor, description.flags, description.state.kind())?;
        descriptions.push(descriptor);
    }
    for (terminal, rebuilt) in tree.terminals.iter().zip(terminals) {
        terminal.complete(rebuilt)?;
    }
    let starters = context.take_starters();
    drop(context);
    rebuild_unix_sockets(tree, &mut descriptions, &own_root, &pids, makers)?;
    for (description, descriptor) in tree.descriptions.iter().zip(&descriptions) {
        description.locks.iter().try_for_each(|lock| lock.take(descriptor))?;
    }
    Ok(Objects {
        descriptions,
        shared,
        starters,
        held: HashSet::new(),
        files: HashMap::new(),
        root: own_root,
    })
}

/// Puts unix sockets in the places of their placeholders.
fn rebuild_unix_sockets(
    tree: &Tree,
    descriptions: &mut [OwnedFd],
    root: &OwnedFd,
    pids: &HashMap<i32, i32>,
    makers: &mut Makers<'_>,
) -> Result<(), RestoreError> {
    let sockets: Vec<_> = tree
        .descriptions
        .iter()
        .enumerate()
        .filter_map(|(index, description)| match &description.state {
            DescriptorState::UnixSocket(socket) => Some((index, socket)),
            _ => None,
        })
        .collect();
    if sockets.is_empty() {
        return Ok(());
    }
    for (index, socket) in unix_socket::rebuild::assemble(&sockets, descriptions, root.as_fd(), pids, makers)?
    {
        set_status(&socket, tree.descriptions[index].flags, "unix socket")?;
        descriptions[index] = socket;
    }
    Ok(())
}

/// Rebuilds all shared objects. An executable must not be open for writing.
fn rebuild_shared(
    tree: &Tree,
    checkpoint: &Checkpoint,
    root: BorrowedFd,
    ipc: BorrowedFd,
) -> Result<Vec<OwnedFd>, RestoreError> {
    let executables: HashSet<usize> =
        tree.living().filter_map(|(_, body)| body.state.address_space.deleted_executable).collect();
    let mut shared = Vec::with_capacity(tree.shared_objects.len());
    for (index, object) in tree.shared_objects.iter().enumerate() {
        let writable = object.rebuild(checkpoint, root, ipc)?;
        shared.push(if executables.contains(&index) {
            let itself = format!("/proc/self/fd/{}", writable.as_raw_fd());
            rustix::fs::open(itself, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(RestoreError::rebuild("a deleted executable", "open"))?
        } else {
            writable
        });
    }
    Ok(shared)
}

/// Status flags that fcntl(F_SETFL) can set, whatever the kind.
fn set_status(descriptor: &OwnedFd, flags: u32, kind: &str) -> Result<(), RestoreError> {
    let settable = OFlags::APPEND | OFlags::ASYNC | OFlags::DIRECT | OFlags::NOATIME | OFlags::NONBLOCK;
    let flags = OFlags::from_bits_retain(flags);
    if flags.contains(OFlags::PATH) {
        return Ok(());
    }
    let now = rustix::fs::fcntl_getfl(descriptor).map_err(RestoreError::rebuild(kind, "fcntl(F_GETFL)"))?;
    if (now ^ flags).intersects(settable) {
        let wanted = (now - settable) | (flags & settable);
        rustix::fs::fcntl_setfl(descriptor, wanted).map_err(RestoreError::rebuild(kind, "fcntl(F_SETFL)"))?;
    }
    Ok(())
}

impl Objects {
    /// The descriptor to map for a mapping, if it needs one; files are opened once.
    pub(crate) fn for_mapping(&mut self, backing: &Backing) -> Result<Option<BorrowedFd<'_>>, RestoreError> {
        match backing {
            Backing::Anonymous | Backing::SystemV(_) | Backing::SystemVPart(_) | Backing::Vdso(_) => Ok(None),
            Backing::SharedMemory(object, _) | Backing::PrivateView(object, _) => {
                Ok(self.shared.get(*object).map(AsFd::as_fd))
            }
            Backing::File(file) => {
                let key = (file.path.to_vec(), file.writable);
                if !self.files.contains_key(&key) {
                    let opened = open_mapped(&self.root, file)?;
                    self.files.insert(key.clone(), opened);
                }
                Ok(self.files.get(&key).map(AsFd::as_fd))
            }
        }
    }
}

fn open_mapped(root: &OwnedFd, file: &MappedFile) -> Result<OwnedFd, RestoreError> {
    let path = || String::from_utf8_lossy(&file.path).into_owned();
    let access = if file.writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = rustix::fs::openat2(
        root,
        file.path.as_slice(),
        flags,
        Mode::empty(),
        rustix::fs::ResolveFlags::IN_ROOT,
    )
    .map_err(|errno| RestoreError::File { path: path(), reason: std::io::Error::from(errno).to_string() })?;
    let stat = rustix::fs::fstat(&opened).map_err(RestoreError::rebuild(path(), "fstat"))?;
    let device = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
    // A shared file may have grown since; a private one, such as a library, must be the same.
    if !device && !file.shared && stat.st_size as u64 != file.size {
        let reason = format!("it has {} bytes here, and had {} at the checkpoint", stat.st_size, file.size);
        return Err(RestoreError::File { path: path(), reason });
    }
    Ok(opened)
}

/// Sends descriptors to whichever puppet runs [`receive`] next.
pub(crate) fn send(socket: &OwnedFd, descriptors: &[BorrowedFd]) -> Result<(), RestoreError> {
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    for batch in descriptors.chunks(BATCH) {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(batch));
        let byte = [std::io::IoSlice::new(b"d")];
        rustix::net::sendmsg(socket, &byte, &mut ancillary, SendFlags::empty())
            .map_err(RestoreError::rebuild("descriptors", "sendmsg"))?;
    }
    Ok(())
}

/// Adds the calls that receive `count` descriptors, in the lowest free numbers, close-on-exec.
pub(crate) fn receive(program: &mut Program, socket: i32, count: usize) {
    let mut left = count;
    while left > 0 {
        let batch = left.min(BATCH);
        let message = receive_header(program, batch);
        let arguments = [socket.into(), message.into(), MSG_CMSG_CLOEXEC.into()];
        program.call("receive descriptors", libc::SYS_recvmsg, arguments);
        left -= batch;
    }
}

/// `struct msghdr` for one byte and `count` descriptors.
fn receive_header(program: &mut Program, count: usize) -> Data {
    let control_size = 16 + (count * 4).next_multiple_of(8);
    let byte = program.space(8);
    let vector = program.words(&[0, 1]);
    program.point(vector, 0, byte);
    let control = program.space(control_size);
    let header = program.words(&[0, 0, 0, 1, 0, control_size as u64, 0]);
    program.point(header, 16, vector);
    program.point(header, 32, control);
    header
}

/// Adds the calls that give a process its descriptors. Nothing but the socket is open in it.
///
/// Received descriptors take the lowest free numbers, in order; in a list sorted by number none lands above
/// its own place. So from the last to the first, each is moved to a place that is free by then.
pub(crate) fn place(program: &mut Program, socket: i32, descriptors: &[Descriptor]) {
    let mut taken: Vec<i32> = Vec::new();
    for batch in descriptors.chunks(BATCH) {
        receive(program, socket, batch.len());
        let landed = lowest_free(&taken, batch.len());
        for (descriptor, at) in batch.iter().zip(&landed).rev() {
            let flag = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
            if *at != descriptor.number {
                let arguments = [(*at).into(), descriptor.number.into(), flag.into()];
                program.call("put a descriptor in its place", libc::SYS_dup3, arguments);
                program.call("close its temporary number", libc::SYS_close, [(*at).into()]);
            } else if !descriptor.close_on_exec {
                let arguments = [(*at).into(), libc::F_SETFD.into(), 0.into()];
                program.call("keep a descriptor over execve", libc::SYS_fcntl, arguments);
            }
        }
        taken.extend(batch.iter().map(|descriptor| descriptor.number));
    }
}

/// Adds the calls that set who gets the signals of a description, and which signal. The owner may be gone.
pub(crate) fn set_owner(number: i32, (kind, id, signal): (i32, i32, i32), program: &mut Program) {
    const F_SETSIG: i32 = 10;
    const F_SETOWN_EX: i32 = 15;
    let owner = program.words(&[u64::from(kind as u32) | u64::from(id as u32) << 32]);
    let arguments = [number.into(), F_SETOWN_EX.into(), owner.into()];
    program.try_call("set who gets a descriptor's signals", libc::SYS_fcntl, arguments);
    let arguments = [number.into(), F_SETSIG.into(), signal.into()];
    program.call("set a descriptor's signal", libc::SYS_fcntl, arguments);
}

/// The `count` lowest numbers that are not in `taken`, which is sorted.
fn lowest_free(taken: &[i32], count: usize) -> Vec<i32> {
    let mut taken = taken.iter().peekable();
    let mut free = Vec::with_capacity(count);
    let mut number = 0;
    while free.len() < count {
        if taken.next_if(|used| **used == number).is_none() {
            free.push(number);
        }
        number += 1;
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_descriptors_never_land_above_their_places() {
        let numbers: Vec<i32> = (0..600).filter(|number| number % 3 != 1).chain([1000, 4000]).collect();
        let mut taken: Vec<i32> = Vec::new();
        for batch in numbers.chunks(BATCH) {
            let landed = lowest_free(&taken, batch.len());
            assert!(landed.iter().zip(batch).all(|(at, number)| at <= number));
            let mut open: Vec<i32> = taken.iter().chain(&landed).copied().collect();
            for (at, number) in landed.iter().zip(batch).rev() {
                assert!(at == number || !open.contains(number), "{number} is free when {at} moves there");
                open.retain(|used| used != at);
                open.push(*number);
            }
            taken.extend(batch);
        }
    }
}
