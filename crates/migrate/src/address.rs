//! Where to migrate to: `ssh://[user@]host[:port]` or `limosa://host:port/TICKET`.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::limits::Limits;
use crate::outcome::{Connect, Purpose};
use crate::ticket::{Ticket, TicketError};
use crate::transport::Transport;
use crate::{ssh, tls};

/// A destination. `Display` writes it in full, with the ticket; [`Address::redacted`] without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `limosa receive` run through ssh.
    Ssh {
        /// The user there, if given.
        user: Option<String>,
        /// The host, as ssh knows it.
        host: String,
        /// The port, if given.
        port: Option<u16>,
    },
    /// A listening `limosa receive`.
    Listening {
        /// A name or an address.
        host: String,
        /// The TCP port.
        port: u16,
        /// The ticket that it printed.
        ticket: Ticket,
    },
}

/// Text that is not a destination.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Neither form.
    #[error("{text:?} is not a destination: use ssh://[user@]host[:port], or limosa://host:port/TICKET")]
    Scheme {
        /// The text, without what could be a ticket.
        text: String,
    },
    /// A part of it is wrong.
    #[error("the {part} {text:?} of the destination cannot be used")]
    Part {
        /// Which part.
        part: &'static str,
        /// As it is written.
        text: String,
    },
    /// The ticket.
    #[error("the destination's ticket cannot be used")]
    Ticket(#[from] TicketError),
}

/// Why a connection to a destination was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The program that should make it does not run.
    #[error("running {program}")]
    Run {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name has no address.
    #[error("looking up {host}")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody listens, or nothing gets there.
    #[error(
        "connecting to {address}; is `limosa receive --listen` still running there, and is the port open?"
    )]
    Tcp {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TLS could not be established.
    #[error("establishing TLS with {address}")]
    Tls {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Someone else listens there: the key is not the one that the ticket pins.
    #[error(
        "whoever listens at {address} is not the one that made the ticket: its key is another. Nothing was sent to it"
    )]
    WrongKey {
        /// Host and port.
        address: String,
    },
    /// The listener hung up when it saw the proof.
    #[error(
        "{address} does not take the ticket: it is wrong, used or expired. Run `limosa receive --listen` again there"
    )]
    TicketRefused {
        /// Host and port.
        address: String,
    },
    /// The listener has the key but not the secret.
    #[error("{address} did not prove that it has the ticket's secret")]
    NotProved {
        /// Host and port.
        address: String,
    },
}

impl Address {
    /// As it may be shown and logged: without the ticket.
    pub fn redacted(&self) -> String {
        match self {
            Self::Ssh { .. } => self.to_string(),
            Self::Listening { host, port, .. } => format!("limosa://{}", authority(host, *port)),
        }
    }
}

/// Host and port; an IPv6 address in brackets.
pub(crate) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ssh { user, host, port } => {
                f.write_str("ssh://")?;
                user.iter().try_for_each(|user| write!(f, "{user}@"))?;
                match port {
                    Some(port) => f.write_str(&authority(host, *port)),
                    None if host.contains(':') => write!(f, "[{host}]"),
                    None => f.write_str(host),
                }
            }
            Self::Listening { host, port, ticket } => {
                write!(f, "limosa://{}/{ticket}", authority(host, *port))
            }
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(rest) = text.strip_prefix("ssh://") {
            let rest = rest.strip_suffix('/').unwrap_or(rest);
            let (user, place) =
                rest.rsplit_once('@').map_or((None, rest), |(user, place)| (Some(user), place));
            let user = user.map(|user| word("user", user)).transpose()?;
            let (host, port) = host_and_port(place)?;
            return Ok(Self::Ssh { user, host, port });
        }
        if let Some(rest) = text.strip_prefix("limosa://") {
            let (place, ticket) = rest.split_once('/').unwrap_or((rest, ""));
            let (host, port) = host_and_port(place)?;
            let port = port.ok_or_else(|| AddressError::Part { part: "port", text: String::new() })?;
            return Ok(Self::Listening { host, port, ticket: ticket.parse()? });
        }
        Err(AddressError::Scheme { text: text.chars().take(20).collect() })
    }
}

/// A name that a command line can take: not an option, nothing that a shell would look at.
fn word(part: &'static str, text: &str) -> Result<String, AddressError> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%' | '+');
    if text.is_empty() || text.len() > 255 || text.starts_with('-') || !text.chars().all(plain) {
        return Err(AddressError::Part { part, text: text.chars().take(64).collect() });
    }
    Ok(text.to_owned())
}

fn host_and_port(text: &str) -> Result<(String, Option<u16>), AddressError> {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').unwrap_or(rest))),
        None => text.rsplit_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let number = |port: &str| match port.parse() {
        Ok(number @ 1..) if port.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
        _ => Err(AddressError::Part { part: "port", text: port.chars().take(64).collect() }),
    };
    Ok((word("host", host)?, port.map(number).transpose()?))
}

impl Connect for Address {
    type Error = ConnectError;

    fn connect(&mut self, purpose: Purpose, limits: &Limits) -> Result<Transport, ConnectError> {
        match self {
            // What a connection is for is said inside: the other side runs `limosa receive` in either case.
            Self::Ssh { user, host, port } => ssh::connect(user.as_deref(), host, *port, limits),
            Self::Listening { host, port, ticket } => tls::connect(host, *port, ticket, purpose, limits),
        }
    }

    fn has_heirs(&self) -> bool {
        matches!(self, Self::Listening { .. })
    }

    fn address(&self) -> String {
        self.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::Address;
    use crate::ticket::Ticket;

    #[test]
    fn text_and_back() {
        let ticket = Ticket::new(b"certificate").expect("ticket");
        for text in [
            "ssh://b".to_owned(),
            "ssh://root@b.example:2222".to_owned(),
            "ssh://[2001:db8::1]".to_owned(),
            "ssh://root@[fe80::1%eth0]:22".to_owned(),
            format!("limosa://192.0.2.7:4000/{ticket}"),
            format!("limosa://[2001:db8::7]:4000/{ticket}"),
        ] {
            let address: Address = text.parse().expect("an address");
            assert_eq!(address.to_string(), text);
            assert!(!address.redacted().contains(&ticket.to_string()));
        }
    }

    #[test]
    fn what_a_shell_or_ssh_could_misread_is_refused() {
        for text in [
            "b",
            "http://b",
            "ssh://",
            "ssh://-oProxyCommand=reboot",
            "ssh://-l@b",
            "ssh://b;reboot",
            "ssh://b:0",
            "ssh://b:+22",
            "ssh://b:65536",
            "ssh://$(reboot)@b",
            "limosa://b:4000/",
            "limosa://b/AAAA",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
