//! A process that is killed while it copies the messages of a queue loses none.
#![allow(unsafe_code, reason = "processes are forked and killed")]

use std::io::Read;
use std::time::Duration;

use limosa_kernel::mqueue::{self, Message};
use limosa_kernel::namespace::{self, Kind};

#[test]
fn a_kill_loses_no_message() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: this test needs root");
    }
    let (copied, kills) = std::thread::scope(|scope| scope.spawn(kill_many).join().expect("no panic"));
    println!("{kills} kills; {copied} of them after a copy was complete");
}

fn kill_many() -> (u32, u32) {
    const KILLS: u32 = 300;
    namespace::unshare(&[Kind::Ipc]).expect("an IPC namespace");
    let queue = mqueue::create(c"test", 0o600, 10, 1000).expect("a queue");
    let mut expected: Vec<Message> = Vec::new();
    for priority in [3, 3, 2, 2, 2, 1, 1, 0, 0, 0] {
        let content = vec![expected.len() as u8; 100 * expected.len()];
        expected.push(Message { priority, content });
    }
    for message in &expected {
        mqueue::send(&queue, message).expect("sent");
    }
    let mut after_one = 0;
    for round in 0..KILLS {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        // SAFETY: the child calls what the C library allows in children of programs with threads (its allocator is one of
        // them), and never returns.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork");
        if child == 0 {
            drop(read);
            while mqueue::copy_messages(&queue).is_ok() {
                let _ = rustix::io::write(&write, b".");
            }
            // SAFETY: ends this process only.
            unsafe { libc::_exit(1) };
        }
        drop(write);
        // Half of the kills come when copies are being made for sure, however busy the machine is.
        if round % 2 == 0 {
            assert_eq!(rustix::io::read(&read, &mut [0; 1]), Ok(1));
        }
        std::thread::sleep(Duration::from_micros(u64::from(round * 37 % 1500)));
        // SAFETY: a child of ours, which is not reaped yet.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        // The end of the pipe that the child and its helper share is closed when both are gone.
        let mut copies = Vec::new();
        std::fs::File::from(read).read_to_end(&mut copies).expect("the end");
        after_one += u32::from(round % 2 == 0 || !copies.is_empty());
        assert_eq!(mqueue::copy_messages(&queue).expect("a copy"), expected, "after kill {round}");
    }
    (after_one, KILLS)
}
