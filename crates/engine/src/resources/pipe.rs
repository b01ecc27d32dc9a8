//! Pipes and FIFOs: their content, size and packet mode (pipe(7), fifo(7)).
//!
//! Both ends of a pipe are descriptions of one inode. The content travels with the first description seen.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::pipe::{PipeFlags, SpliceFlags};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext};
use crate::error::{CaptureError, RestoreError};
use crate::view::DescriptionView;

const KIND: &str = "pipe";
/// Largest pipe that is believed: `/proc/sys/fs/pipe-max-size` is 1 MiB unless an administrator raised it.
const SIZE_MAX: u32 = 1 << 30;

/// One end of a pipe or FIFO.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pipe {
    /// The inode, which tells pipes of one checkpoint apart.
    pub inode: u64,
    /// The path of a FIFO; none for a pipe.
    pub path: Option<serde_bytes::ByteBuf>,
    /// The pipe itself, with the first description of it.
    pub content: Option<Content>,
}

/// What is in a pipe.
#[derive(Debug, Serialize, Deserialize)]
pub struct Content {
    /// Capacity in bytes.
    pub size: u32,
    /// Whether the bytes are packets (`O_DIRECT`).
    pub packets: bool,
    /// The bytes in order, in the pieces that packet mode keeps apart (one piece otherwise).
    pub pieces: Vec<serde_bytes::ByteBuf>,
}

impl DescriptorKind for Pipe {
    fn recognise(view: &DescriptionView) -> bool {
        // An O_PATH descriptor of a FIFO stands for its place only.
        FileType::from_raw_mode(view.stat.st_mode) == FileType::Fifo && !view.is_path()
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let inode = view.stat.st_ino;
        let path = path(view)?;
        let content = if context.first(KIND, inode ^ view.stat.st_dev) {
            Some(content(view, has_packet_writer(view, context))?)
        } else {
            None
        };
        Ok(Self { inode: inode ^ view.stat.st_dev, path, content })
    }

    fn examine(view: &DescriptionView, _: &mut CaptureContext) -> Result<(), CaptureError> {
        path(view).map(drop)
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        let both = match &self.path {
            Some(path) => {
                // Read and write at once: opening never waits for the other end, and content can be put in.
                context.shared(KIND, self.inode, |context| {
                    context.open(path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty())
                })?
            }
            None => context.shared(KIND, self.inode, |_| {
                let (read, _write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(fail("pipe2"))?;
                reopen(read.as_fd(), OFlags::RDWR | OFlags::NONBLOCK)
            })?,
        };
        let both = both.try_clone().map_err(|source| RestoreError::Rebuild {
            object: KIND.into(),
            step: "dup",
            source,
        })?;
        if let Some(content) = &self.content {
            content.fill(&both)?;
        }
        // A new description of the same pipe with its own access mode and flags.
        let kept = OFlags::ACCMODE | OFlags::NONBLOCK;
        let wanted = OFlags::from_bits_retain(flags) & kept;
        reopen(both.as_fd(), if wanted.contains(OFlags::RDWR) { wanted } else { wanted | OFlags::NONBLOCK })
    }
}

/// The path of a FIFO; none for a pipe.
fn path(view: &DescriptionView) -> Result<Option<serde_bytes::ByteBuf>, CaptureError> {
    if view.link.starts_with(b"pipe:[") {
        return Ok(None);
    }
    if view.stat.st_nlink == 0 {
        return Err(view.refuse("the FIFO has been deleted", "close it before the checkpoint").into());
    }
    Ok(Some(view.link.clone().into()))
}

fn fail(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> RestoreError {
    RestoreError::rebuild(KIND, step)
}

fn reopen(pipe: std::os::fd::BorrowedFd, flags: OFlags) -> Result<OwnedFd, RestoreError> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(fail("open"))
}

/// Whether a writing end in packet mode is in the tree: the mode belongs to the writer's description.
fn has_packet_writer(view: &DescriptionView, context: &CaptureContext) -> bool {
    context.descriptions.iter().any(|other| {
        (other.stat.st_dev, other.stat.st_ino) == (view.stat.st_dev, view.stat.st_ino)
            && OFlags::from_bits_retain(other.info.flags).contains(OFlags::DIRECT)
    })
}

/// Reads the content without taking it out: tee(2) into a pipe of our own. What was written as packets is also
/// read as packets, so that several pieces say so even where the writer is gone. A single packet of a writer that
/// is gone comes back as plain bytes.
fn content(view: &DescriptionView, packet_writer: bool) -> Result<Content, CaptureError> {
    let fail = |what| CaptureError::io(what, view.process.pid);
    let size = rustix::pipe::fcntl_getpipe_size(&view.descriptor).map_err(fail("asking a pipe's size"))? as u32;
    // Through /proc for a reading end of our own, whatever end the process holds.
    let source = rustix::fs::open(
        format!("/proc/self/fd/{}", view.descriptor.as_raw_fd()),
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(fail("opening a pipe"))?;
    let (out, into) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(fail("pipe2"))?;
    rustix::pipe::fcntl_setpipe_size(&into, size as usize).map_err(fail("making a pipe as large"))?;
    let mut pieces = Vec::new();
    match rustix::pipe::tee(&source, &into, size as usize, SpliceFlags::NONBLOCK) {
        Ok(0) | Err(rustix::io::Errno::AGAIN) => {}
        Ok(length) => {
            let mut left = length;
            while left > 0 {
                let mut piece = vec![0; left];
                let got = rustix::io::read(&out, &mut piece).map_err(fail("reading a pipe's copy"))?;
                piece.truncate(got);
                left -= got;
                pieces.push(piece.into());
            }
        }
        Err(errno) => return Err(fail("copying a pipe's content")(errno)),
    }
    Ok(Content { size, packets: packet_writer || pieces.len() > 1, pieces })
}

impl Content {
    fn fill(&self, pipe: &OwnedFd) -> Result<(), RestoreError> {
        let bytes: usize = self.pieces.iter().map(|piece| piece.len()).sum();
        if self.size > SIZE_MAX || bytes > self.size as usize {
            return Err(RestoreError::inconsistent(format!("a pipe of {} bytes holds {bytes}", self.size)));
        }
        rustix::pipe::fcntl_setpipe_size(pipe, self.size as usize).map_err(fail("fcntl(F_SETPIPE_SZ)"))?;
        let writer = reopen(pipe.as_fd(), OFlags::WRONLY | OFlags::NONBLOCK)?;
        if self.packets {
            // open(2) takes O_DIRECT for files only.
            rustix::fs::fcntl_setfl(&writer, OFlags::DIRECT | OFlags::NONBLOCK).map_err(fail("fcntl(F_SETFL)"))?;
        }
        for piece in &self.pieces {
            let written = rustix::io::write(&writer, piece).map_err(fail("write"))?;
            if written != piece.len() {
                return Err(RestoreError::inconsistent("a pipe's content does not fit into it"));
            }
        }
        Ok(())
    }
}
