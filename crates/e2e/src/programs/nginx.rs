//! nginx with two workers and a client in the middle of a slow download.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;

use super::{Program, connect, start};
use crate::sandbox::Sandbox;

const PORT: u16 = 8090;
const SIZE: usize = 6 << 20;
/// At 2 MiB/s a download takes about 3 s.
const RATE: &str = "2m";

/// A running nginx.
pub struct Nginx {
    child: Child,
    address: SocketAddr,
    content: Vec<u8>,
    download: Download,
}

impl Nginx {
    /// Starts the server, and a download of which the first part has come.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let directory = sandbox.directory().join("nginx");
        fs::create_dir_all(directory.join("root"))?;
        let content: Vec<u8> =
            (0..SIZE as u64 / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9)).to_le_bytes()).collect();
        fs::write(directory.join("root/large"), &content)?;
        fs::write(directory.join("nginx.conf"), configuration(&directory))?;
        let configuration = directory.join("nginx.conf");
        let prefix = directory.as_os_str();
        let mut child = start(
            &directory,
            "nginx",
            &["nginx".as_ref(), "-p".as_ref(), prefix, "-c".as_ref(), configuration.as_os_str()],
        )?;
        let address = SocketAddr::from(([127, 0, 0, 1], PORT));
        drop(connect("nginx", &mut child, address)?);
        Ok(Self { child, address, content, download: Download::start(address)? })
    }
}

fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "daemon off; master_process on; worker_processes 2; user root; pid {directory}/pid; error_log {directory}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on;
            client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
            fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
            server {{
                listen 127.0.0.1:{PORT};
                location / {{ root {directory}/root; limit_rate {RATE}; }}
            }}
        }}\n"
    )
}

impl Program for Nginx {
    fn root(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Finishes the download that was under way, compares it, and begins the next.
    fn verify(&mut self) -> Result<String> {
        let download = std::mem::replace(&mut self.download, Download::start(self.address)?);
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
    fn start(address: SocketAddr) -> Result<Self> {
        let mut stream = TcpStream::connect(address).context("connecting to nginx")?;
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
