//! nginx with two workers and a client in the middle of a slow download.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;

use super::{Program, connect};
use crate::ground::Ground;

const PORT: u16 = 8090;
const SIZE: usize = 4 << 20;
/// At 2 MiB/s a download takes about 2 s.
const RATE: &str = "2m";

/// A running nginx.
pub struct Nginx<'g> {
    ground: &'g dyn Ground,
    root: Pid,
    content: Vec<u8>,
    download: Download,
}

impl<'g> Nginx<'g> {
    /// Starts the server, and a download of which the first part has come.
    pub fn start(ground: &'g dyn Ground) -> Result<Self> {
        let directory = ground.directory().join("nginx");
        fs::create_dir_all(ground.seen(&directory.join("root")))?;
        let content: Vec<u8> =
            (0..SIZE as u64 / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9)).to_le_bytes()).collect();
        fs::write(ground.seen(&directory.join("root/large")), &content)?;
        let configuration = directory.join("nginx.conf");
        fs::write(ground.seen(&configuration), settings(&directory, ground.address()))?;
        let command = ["nginx", "-p"].map(OsStr::new).into_iter();
        let command: Vec<&OsStr> =
            command.chain([directory.as_os_str(), "-c".as_ref(), configuration.as_os_str()]).collect();
        let root = ground.start("nginx", &command)?;
        let download = Download::start(connect(ground, "nginx", root, PORT)?)?;
        Ok(Self { ground, root, content, download })
    }
}

fn settings(directory: &Path, address: Ipv4Addr) -> String {
    let directory = directory.display();
    format!(
        "daemon off; master_process on; worker_processes 2; user root; pid {directory}/pid; error_log {directory}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on;
            client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
            fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
            server {{
                listen {address}:{PORT};
                location / {{ root {directory}/root; limit_rate {RATE}; }}
            }}
        }}\n"
    )
}

impl Program for Nginx<'_> {
    fn root(&self) -> Pid {
        self.ground.root(self.root)
    }

    /// Finishes the download that was under way, compares it, and begins the next.
    fn verify(&mut self) -> Result<String> {
        let next = Download::start(connect(self.ground, "nginx", self.root, PORT)?)?;
        let download = std::mem::replace(&mut self.download, next);
        let already = download.received.len();
        let received = download.finish()?;
        ensure!(received.len() == self.content.len(), "{} bytes of {}", received.len(), self.content.len());
        ensure!(received == self.content, "the download differs from the file");
        Ok(format!("{already} bytes before, {} after", received.len() - already))
    }
}

/// A response that is being read.
struct Download {
    stream: BufReader<TcpStream>,
    received: Vec<u8>,
}

impl Download {
    /// Sends the request and reads the first 64 KiB.
    fn start(mut stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        ensure!(line.contains(" 200 "), "nginx answered {line:?}");
        while line != "\r\n" {
            line.clear();
            ensure!(stream.read_line(&mut line)? > 0, "nginx closed the connection");
        }
        let mut received = vec![0; 64 << 10];
        stream.read_exact(&mut received).context("reading the beginning of a download")?;
        Ok(Self { stream, received })
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.stream.read_to_end(&mut self.received).context("in the middle of a download")?;
        Ok(self.received)
    }
}
