//! Pipes and FIFOs: what is in them, their size and modes, ends that are closed, ends that other processes hold.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Setting, Verify};
use crate::child::Child;
use crate::sys;

const CONTENT: usize = 100_000;

struct State {
    filled: (OwnedFd, OwnedFd),
    packets: (OwnedFd, OwnedFd),
    hung_up: OwnedFd,
    broken: OwnedFd,
    fifo: File,
    duplicate: OwnedFd,
    to_child: OwnedFd,
    from_child: OwnedFd,
    round: u8,
}

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let (there_read, there_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (back_read, back_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (child_read, child_write) = (there_read.try_clone()?, back_write.try_clone()?);
    let child =
        Child::start(&setting.protocol, "child", move |_| answer(child_read.into(), child_write.into()))?;
    drop((there_read, back_write));

    let filled = pipe_with(PipeFlags::NONBLOCK)?;
    rustix::pipe::fcntl_setpipe_size(&filled.0, 256 << 10)?;
    // Part of a page read: what is left does not begin at a page's start.
    write_all(&filled.1, &sys::pattern(CONTENT + 100, 1))?;
    ensure!(rustix::io::read(&filled.0, &mut [0; 100][..])? == 100);
    let packets = pipe_with(PipeFlags::DIRECT | PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
    send_packets(&packets.1)?;
    let (hung_up, writer) = pipe_with(PipeFlags::empty())?;
    write_all(&writer, b"the last words")?;
    drop(writer);
    let (reader, broken) = pipe_with(PipeFlags::empty())?;
    drop(reader);

    let path = setting.protocol.beside("fifo");
    let _ = std::fs::remove_file(&path);
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .context("making a FIFO")?;
    let mut fifo = OpenOptions::new().read(true).write(true).open(&path)?;
    fifo.write_all(&sys::pattern(5000, 2))?;
    let duplicate = filled.0.try_clone()?;

    let mut state = State {
        filled,
        packets,
        hung_up,
        broken,
        fifo,
        duplicate,
        to_child: there_write,
        from_child: back_read,
        round: 0,
    };
    // What the child has to read when it is asked is in the pipe already, and so while it is checkpointed.
    state.send_to_child()?;
    let flags = state.flags()?;
    Ok(Box::new(move || {
        sys::compare_lines("descriptors", &state.flags()?, &flags)?;
        state.check()?;
        child.verify()?;
        state.hear_from_child()?;
        state.send_to_child()?;
        Ok(String::new())
    }))
}

impl State {
    /// Status flags, descriptor flags and sizes.
    fn flags(&self) -> Result<String> {
        let mut text = String::new();
        for fd in [
            self.filled.0.as_fd(),
            self.filled.1.as_fd(),
            self.packets.0.as_fd(),
            self.packets.1.as_fd(),
            self.hung_up.as_fd(),
            self.broken.as_fd(),
            self.fifo.as_fd(),
            self.duplicate.as_fd(),
            self.to_child.as_fd(),
            self.from_child.as_fd(),
        ] {
            // O_LARGEFILE means nothing on a pipe; the kernel sets it on every description that open(2) makes.
            let status = rustix::fs::fcntl_getfl(fd)? - OFlags::LARGEFILE;
            let own = rustix::io::fcntl_getfd(fd)?;
            let size = rustix::pipe::fcntl_getpipe_size(fd)?;
            let close = own.contains(FdFlags::CLOEXEC);
            let _ = writeln!(text, "{fd:?} {status:?} close-on-exec={close} size={size}");
        }
        Ok(text)
    }

    fn check(&mut self) -> Result<()> {
        let expected = &sys::pattern(CONTENT + 100, 1)[100..];
        // Half of it through the duplicate: one description, one content.
        let mut found = read_some(&self.duplicate, CONTENT / 2)?;
        found.extend(read_some(&self.filled.0, CONTENT)?);
        sys::compare("a pipe's content", &found, expected)?;
        write_all(&self.filled.1, expected)?;

        for expected in packets() {
            let packet = read_some(&self.packets.0, 1)?;
            sys::compare("a packet's first byte", &packet, &expected[..1])?;
        }
        let mut byte = [0];
        let empty = rustix::io::read(&self.packets.0, &mut byte[..]);
        ensure!(empty == Err(Errno::AGAIN), "more packets than were sent: {empty:?}");
        send_packets(&self.packets.1)?;

        // Its writer is gone, so that it cannot be filled again: look without taking.
        let waiting = rustix::io::ioctl_fionread(&self.hung_up)?;
        ensure!(waiting == 14, "{waiting} bytes of 14 in a pipe without a writer");
        let mut poll = [rustix::event::PollFd::new(&self.hung_up, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut poll, None)?;
        ensure!(
            poll[0].revents().contains(rustix::event::PollFlags::HUP),
            "no hang-up: {:?}",
            poll[0].revents()
        );
        let refused = rustix::io::write(&self.broken, b"x");
        ensure!(refused == Err(Errno::PIPE), "a pipe without a reader takes data: {refused:?}");

        let mut content = vec![0; 5000];
        self.fifo.read_exact(&mut content)?;
        sys::compare("a FIFO's content", &content, &sys::pattern(5000, 2))?;
        self.fifo.write_all(&content)?;
        Ok(())
    }

    fn send_to_child(&mut self) -> Result<()> {
        self.round = self.round.wrapping_add(1);
        write_all(&self.to_child, &[self.round])
    }

    fn hear_from_child(&self) -> Result<()> {
        let heard = read_some(&self.from_child, 1)?;
        ensure!(heard == [self.round ^ 0xff], "the child says {heard:?} after {}", self.round);
        Ok(())
    }
}

/// The child reads a byte that its parent wrote, and answers through the other pipe.
fn answer(mut from: File, mut to: File) -> Result<Box<Verify>> {
    let mut first = true;
    Ok(Box::new(move || {
        // The first request only asks whether the child is there.
        if !std::mem::take(&mut first) {
            let mut byte = [0];
            from.read_exact(&mut byte)?;
            to.write_all(&[byte[0] ^ 0xff])?;
        }
        Ok(String::new())
    }))
}

fn packets() -> [Vec<u8>; 3] {
    [sys::pattern(10, 11), sys::pattern(4096, 12), sys::pattern(1, 13)]
}

fn send_packets(to: &OwnedFd) -> Result<()> {
    packets().iter().try_for_each(|packet| write_all(to, packet))
}

fn write_all(to: &OwnedFd, bytes: &[u8]) -> Result<()> {
    let written = rustix::io::write(to, bytes).context("writing into a pipe")?;
    ensure!(written == bytes.len(), "only {written} of {} bytes fit into the pipe", bytes.len());
    Ok(())
}

fn read_some(from: &OwnedFd, at_most: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; at_most];
    let read = rustix::io::read(from, &mut bytes[..]).context("reading from a pipe")?;
    bytes.truncate(read);
    Ok(bytes)
}
