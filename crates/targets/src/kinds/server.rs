//! A TCP server for clients outside the tree: answers each connection's line with the same line. With the option `deaf`
//! it never accepts. Its port is in a file beside the result.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

use super::{Setting, Verify};

pub fn set_up(setting: &Setting) -> Result<Box<Verify>> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    fs::write(setting.protocol.beside("port"), port.to_string()).context("writing the port")?;
    let served = Arc::new(AtomicU64::new(0));
    if setting.options.iter().any(|option| option == "deaf") {
        return Ok(Box::new(move || Ok(listener.local_addr()?.port().to_string())));
    }
    let count = Arc::clone(&served);
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut connection = BufReader::new(connection);
            let mut line = String::new();
            if connection.read_line(&mut line).is_ok()
                && connection.get_mut().write_all(line.as_bytes()).is_ok()
            {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    Ok(Box::new(move || Ok(served.load(Ordering::Relaxed).to_string())))
}
