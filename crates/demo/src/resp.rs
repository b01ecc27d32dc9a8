//! A client of redis: the little of its protocol (RESP2) that the demo needs.
//!
//! A request is an array of bulk strings; a reply is a status `+…`, an error `-…`, an integer `:…`, a bulk string
//! `$LENGTH…` or an array `*COUNT…` of these.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long a reply may take. Far longer than any migration: a connection that is silent for so long is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// A status, such as `OK`.
    Status(String),
    /// An integer.
    Integer(i64),
    /// A string, or none.
    Bulk(Option<Vec<u8>>),
    /// Several replies.
    Array(Vec<Reply>),
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects, from the calling thread's network namespace.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { reader: BufReader::with_capacity(1 << 18, stream) })
    }

    /// Another handle on the connection.
    pub fn handle(&self) -> io::Result<TcpStream> {
        self.reader.get_ref().try_clone()
    }

    /// Sends one request and waits for its reply.
    pub fn call(&mut self, arguments: &[&[u8]]) -> io::Result<Reply> {
        let mut request = Vec::new();
        encode(arguments, &mut request);
        self.send(&request)?;
        self.receive()
    }

    /// Sends requests that [`encode`] wrote.
    pub fn send(&mut self, requests: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(requests)
    }

    /// Waits for the next reply. One that is an error is an error here.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let line = self.line()?;
        let mut characters = line.chars();
        let kind = characters.next();
        let rest = characters.as_str();
        match kind {
            Some('+') => Ok(Reply::Status(rest.to_owned())),
            Some('-') => Err(io::Error::other(format!("redis answered: {rest}"))),
            Some(':') => Ok(Reply::Integer(number(rest)?)),
            Some('$') => self.bulk(number(rest)?),
            Some('*') => {
                (0..number(rest)?).map(|_| self.receive()).collect::<io::Result<_>>().map(Reply::Array)
            }
            _ => Err(unexpected(&line)),
        }
    }

    fn bulk(&mut self, length: i64) -> io::Result<Reply> {
        let Ok(length) = usize::try_from(length) else { return Ok(Reply::Bulk(None)) };
        let mut text = vec![0; length + 2];
        self.reader.read_exact(&mut text)?;
        text.truncate(length);
        Ok(Reply::Bulk(Some(text)))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        if !line.ends_with("\r\n") {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "redis closed the connection"));
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }
}

/// Appends a request to `to`.
pub fn encode(arguments: &[&[u8]], to: &mut Vec<u8>) {
    to.extend(format!("*{}\r\n", arguments.len()).as_bytes());
    for argument in arguments {
        to.extend(format!("${}\r\n", argument.len()).as_bytes());
        to.extend(*argument);
        to.extend(b"\r\n");
    }
}

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(|_| unexpected(text))
}

fn unexpected(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("redis answered {line:?}, which is no reply"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_request_has_lengths_in_bytes() {
        let mut request = Vec::new();
        encode(&[b"SET", b"k", "ü".as_bytes()], &mut request);
        assert_eq!(request, "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\nü\r\n".as_bytes());
    }

    #[test]
    fn all_kinds_of_replies_are_understood() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let mut client = Client::connect(listener.local_addr().expect("its number")).expect("a connection");
        let (mut server, _) = listener.accept().expect("the connection");
        server.write_all(b"+OK\r\n:-3\r\n*2\r\n$2\r\na\n\r\n$-1\r\n-ERR no\r\n?\r\n").expect("room for it");
        drop(server);
        assert_eq!(client.receive().expect("a status"), Reply::Status("OK".to_owned()));
        assert_eq!(client.receive().expect("an integer"), Reply::Integer(-3));
        let array = vec![Reply::Bulk(Some(b"a\n".to_vec())), Reply::Bulk(None)];
        assert_eq!(client.receive().expect("an array"), Reply::Array(array));
        assert_eq!(client.receive().expect_err("an error").to_string(), "redis answered: ERR no");
        assert_eq!(client.receive().expect_err("not a reply").kind(), io::ErrorKind::InvalidData);
        assert_eq!(client.receive().expect_err("the end").kind(), io::ErrorKind::UnexpectedEof);
    }
}
