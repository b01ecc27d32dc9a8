//! What a container is: what its owner asked for, and all that another host needs to know to run it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::rootfs::Identity;

/// The search path of a container whose environment has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The longest container name, bytes: it is also a host name (at most 64) and part of file names.
pub const MAX_NAME: usize = 63;

/// The name of a container: letters, digits, `_`, `.` and `-`, the first a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl TryFrom<String> for Name {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if first && text.len() <= MAX_NAME && text.bytes().all(allowed) {
            Ok(Self(text))
        } else {
            Err(ParseError::Name { text })
        }
    }
}

impl FromStr for Name {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.to_owned().try_into()
    }
}

/// Everything about a container that is not a fact of the host it happens to run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Its name, unique in one state directory, and its host name.
    pub name: Name,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Environment variables beyond the standard ones.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// The read-only layer: a directory.
    pub rootfs: PathBuf,
    /// What that directory held when the container was made; filled in before a migration at the latest.
    #[serde(default)]
    pub rootfs_identity: Option<Identity>,
    /// Its interface, if it has one.
    #[serde(default)]
    pub network: Option<Network>,
    /// Limit of its memory, bytes.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Whether its standard streams are a terminal.
    #[serde(default)]
    pub terminal: bool,
}

impl Config {
    /// The environment of its processes, sorted, as `KEY=VALUE`.
    pub fn environment_strings(&self) -> Vec<String> {
        let standard = [
            ("PATH", DEFAULT_PATH),
            ("HOME", "/root"),
            ("HOSTNAME", self.name.as_str()),
            ("LANG", "C.UTF-8"),
            ("TERM", if self.terminal { "xterm-256color" } else { "dumb" }),
        ];
        let mut all: BTreeMap<&str, &str> = standard.into_iter().collect();
        all.extend(self.environment.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        all.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
    }

    /// The directories in which its commands are looked up.
    pub fn search_path(&self) -> &str {
        self.environment.get("PATH").map_or(DEFAULT_PATH, String::as_str)
    }
}

/// A container's network: one veth pair whose other end is a port of a bridge of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The bridge, by name; one of this name must exist on every host the container is to run on.
    pub bridge: String,
    /// The addresses of its `eth0`.
    pub addresses: Vec<Address>,
    /// Its default routes, at most one for each of IPv4 and IPv6.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
}

/// An address with the length of its subnet's prefix: `10.0.0.7/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of the prefix.
    pub prefix_length: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.prefix_length)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for Address {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl FromStr for Address {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            let prefix_length: u8 = length.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            (prefix_length <= longest).then_some(Self { address, prefix_length })
        };
        parse().ok_or_else(|| ParseError::Address { text: text.to_owned() })
    }
}

/// `BRIDGE,ip=ADDR/LEN[,gw=ADDR]`; `ip=` and `gw=` may come again for the other IP version.
impl FromStr for Network {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = |why| ParseError::Network { text: text.to_owned(), why };
        let mut parts = text.split(',');
        let bridge = parts.next().unwrap_or_default().to_owned();
        if bridge.is_empty() || bridge.len() > 15 || bridge.contains(['/', '=', ' ']) {
            return Err(error("it must start with the name of a bridge"));
        }
        let mut network = Self { bridge, addresses: Vec::new(), gateways: Vec::new() };
        for part in parts {
            match part.split_once('=') {
                Some(("ip", address)) => network.addresses.push(address.parse()?),
                Some(("gw", gateway)) => {
                    network.gateways.push(gateway.parse().map_err(|_| error("gw= is not an IP address"))?);
                }
                _ => return Err(error("after the bridge only ip=ADDR/LEN and gw=ADDR are known")),
            }
        }
        if network.addresses.is_empty() {
            return Err(error("it has no ip=ADDR/LEN"));
        }
        Ok(network)
    }
}

/// Parses an amount of memory: bytes, or a number with K, M, G or T (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, ParseError> {
    let error = || ParseError::Size { text: text.to_owned() };
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text.get(digits.len()..).unwrap_or_default().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(error()),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).filter(|size| *size > 0).ok_or_else(error)
}

/// Text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// A container's name.
    #[error(
        "{text:?} is no container name: use at most {MAX_NAME} letters, digits, '_', '.' and '-', the first a letter or digit"
    )]
    Name {
        /// The text.
        text: String,
    },
    /// An address with prefix length.
    #[error("{text:?} is no address with prefix length, such as 10.0.0.7/24 or fd00::7/64")]
    Address {
        /// The text.
        text: String,
    },
    /// A network.
    #[error("{text:?} is no network, such as br0,ip=10.0.0.7/24,gw=10.0.0.1: {why}")]
    Network {
        /// The text.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An amount of memory.
    #[error("{text:?} is no amount of memory, such as 256M or 1G")]
    Size {
        /// The text.
        text: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_state_directory_are_refused() {
        for text in ["", ".", "..", "a/b", "-x", "a b", "a\0", &"x".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
        for text in ["redis", "web-1.prod_a", &"x".repeat(63)] {
            assert!(text.parse::<Name>().is_ok(), "{text:?}");
        }
        assert!(serde_json::from_str::<Name>("\"../x\"").is_err());
    }

    #[test]
    fn a_network_has_a_bridge_and_addresses() {
        let network: Network = "br0,ip=10.0.0.7/24,gw=10.0.0.1,ip=fd00::7/64".parse().expect("a network");
        assert_eq!(network.bridge, "br0");
        assert_eq!(network.addresses.len(), 2);
        assert_eq!(network.gateways, ["10.0.0.1".parse::<IpAddr>().expect("an address")]);
        for text in ["br0", ",ip=10.0.0.7/24", "br0,ip=10.0.0.7", "br0,ip=10.0.0.7/33", "br0,x=1"] {
            assert!(text.parse::<Network>().is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_read_is_written_the_same(text: String, near in "[a-z0-9.,:/=]{0,40}", size in "[0-9]{0,21}[ kKMGTiBé]{0,3}") {
            for text in [&text, &near] {
                if let Ok(name) = text.parse::<Name>() {
                    proptest::prop_assert!(name.to_string() == *text && !text.contains('/') && text != "..");
                }
                if let Ok(address) = text.parse::<Address>() {
                    proptest::prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
                }
                let _ = (text.parse::<Network>(), parse_size(text), serde_json::from_str::<Config>(text));
            }
            proptest::prop_assert!(parse_size(&size).is_ok_and(|size| size > 0) || parse_size(&size).is_err());
        }

        #[test]
        fn networks_are_read_whole_or_not(bridge in "[a-z]{1,17}", address: [u8; 4], length in 0_u8..40, more in "(,(ip|gw|x)=[0-9./:]{0,12})?") {
            let address = IpAddr::from(address);
            let network = format!("{bridge},ip={address}/{length}{more}").parse::<Network>();
            if let Ok(network) = network {
                proptest::prop_assert!(network.bridge == bridge && bridge.len() < 16 && length <= 32);
                proptest::prop_assert_eq!(network.addresses[0], Address { address, prefix_length: length });
            }
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        for text in ["", "M", "0", "-1", "1X", "99999999999999T"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
