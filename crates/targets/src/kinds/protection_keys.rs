//! Protection keys (pkeys(7)): keys that are taken, with and without memory behind them, one given back between them, and what
//! two threads may do by them.

use std::arch::asm;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, bail, ensure};

use super::{Setting, Verify};
use crate::sys::{self, Region};

const LENGTH: usize = 4 * 4096;
/// `PKEY_DISABLE_ACCESS`, `PKEY_DISABLE_WRITE`
const NO_ACCESS: u32 = 1;
const NO_WRITE: u32 = 2;

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let keys: Vec<u32> = [NO_ACCESS, 0, NO_WRITE, NO_ACCESS].into_iter().map(take).collect::<Result<_>>()?;
    give_back(keys[1])?;
    let secret = guarded(1, keys[0])?;
    let constant = guarded(2, keys[2])?;
    let pipe = rustix::pipe::pipe()?;
    // A thread of its own mind: it may do everything.
    let (asks, asked) = channel();
    let (answers, answer) = channel();
    std::thread::spawn(move || other_thread(&asked, &answers));
    let rights = rights();
    Ok(Box::new(move || {
        ensure!(self::rights() == rights, "rights {:#x}, not {rights:#x}", self::rights());
        ensure!(!can_read(&pipe, secret)?, "what is behind a key can be read");
        ensure!(can_read(&pipe, constant)?, "what may be read cannot");
        sys::compare("constant memory", constant.bytes(), &sys::pattern(LENGTH, 2))?;
        ensure!(!can_write(&pipe, constant)?, "what is constant can be written");
        asks.send(secret)?;
        answer.recv()?.context("in the other thread")?;
        let next = take(0)?;
        give_back(next)?;
        ensure!(next == keys[1], "key {next} is free, not {}", keys[1]);
        let after = take_all()?;
        ensure!(after.len() == 15 - 3, "{} keys are free: {after:?}", after.len());
        ensure!(self::rights() == rights || set_rights(rights), "rights");
        Ok(String::new())
    }))
}

/// Lifts its own rights once, and keeps them.
fn other_thread(asked: &Receiver<Region>, answers: &Sender<Result<()>>) {
    set_rights(0);
    for secret in asked {
        let seen = if rights() == 0 {
            sys::compare("memory behind a key", secret.bytes(), &sys::pattern(LENGTH, 1))
        } else {
            Err(anyhow::anyhow!("rights {:#x}", rights()))
        };
        let _ = answers.send(seen);
    }
}

fn take(rights: u32) -> Result<u32> {
    // SAFETY: takes numbers only.
    let key = sys::check(unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, rights) });
    Ok(key.context("pkey_alloc: the processor must have protection keys")? as u32)
}

fn give_back(key: u32) -> Result<()> {
    // SAFETY: takes a number only; no memory is behind the keys that are given back.
    sys::check(unsafe { libc::syscall(libc::SYS_pkey_free, key) })?;
    Ok(())
}

/// All keys that are free: taken, and given back.
fn take_all() -> Result<Vec<u32>> {
    let mut keys = Vec::new();
    while let Ok(key) = take(0) {
        keys.push(key);
    }
    keys.iter().try_for_each(|key| give_back(*key))?;
    Ok(keys)
}

fn guarded(seed: u64, key: u32) -> Result<Region> {
    let mut region = Region::anonymous(LENGTH)?;
    sys::fill(region.bytes_mut(), seed);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (address, length) = (region.bytes().as_ptr(), region.bytes().len());
    // SAFETY: only calls of the kernel's touch the region where the key may forbid it.
    sys::check(unsafe { libc::syscall(libc::SYS_pkey_mprotect, address, length, protection, key) })?;
    Ok(region)
}

/// Whether the kernel may read for this thread there.
fn can_read((read, write): &(OwnedFd, OwnedFd), region: Region) -> Result<bool> {
    match rustix::io::write(write, &region.bytes()[..1]) {
        Ok(_) => {
            ensure!(rustix::io::read(read, &mut [0_u8][..])? == 1, "an empty pipe");
            Ok(true)
        }
        Err(rustix::io::Errno::FAULT) => Ok(false),
        Err(errno) => bail!("write: {errno}"),
    }
}

/// Whether it may write there: the byte that is there.
fn can_write((read, write): &(OwnedFd, OwnedFd), mut region: Region) -> Result<bool> {
    rustix::io::write(write, &region.bytes()[..1])?;
    match rustix::io::read(read, &mut region.bytes_mut()[..1]) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::FAULT) => {
            rustix::io::read(read, &mut [0_u8][..])?;
            Ok(false)
        }
        Err(errno) => bail!("read: {errno}"),
    }
}

/// The thread's rights: two bits for each key (PKRU).
fn rights() -> u32 {
    let rights: u32;
    // SAFETY: a processor that has given keys has the instruction, which only reads.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _, options(nomem, nostack)) };
    rights
}

/// Sets them; always true.
fn set_rights(rights: u32) -> bool {
    // SAFETY: nothing but the regions of this kind is behind a key.
    unsafe { asm!("wrpkru", in("eax") rights, in("ecx") 0, in("edx") 0, options(nostack)) };
    true
}
