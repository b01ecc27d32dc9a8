//! The network of a test: machines, and the test itself as a host on the same cable.
//!
//! ```text
//!   the sandbox                 machine a          machine b
//!   cable: a bridge             eth0               eth0
//!   10.98.0.9  ├── tap-a ── qemu ──┘                 │
//!              └── tap-b ─────── qemu ───────────────┘
//! ```
//!
//! In a machine `eth0` is a port of its bridge `br0`, which `limosa run --net br0,…` joins containers to.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The bridge of each machine.
pub const BRIDGE: &str = "br0";
/// The container's address, which moves with it.
pub const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 7);
/// Bits of the prefix of all addresses.
pub const PREFIX: u8 = 24;

const TEST: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 9);

/// The cable.
pub struct Cable(());

/// A machine's network card.
#[derive(Debug, Clone)]
pub struct Card {
    name: String,
    number: u8,
}

impl Cable {
    /// Lays the cable in the sandbox's network, and connects the test to it.
    pub fn lay() -> Result<Self> {
        ip("link add cable type bridge")?;
        ip(&format!("address add {TEST}/{PREFIX} dev cable"))?;
        ip("link set cable up")?;
        Ok(Self(()))
    }

    /// A card for machine `name`; `number` (1 to 8) makes its addresses.
    pub fn card(&self, name: &str, number: u8) -> Result<Card> {
        let card = Card { name: name.to_owned(), number };
        let interface = card.interface();
        ip(&format!("tuntap add {interface} mode tap"))?;
        ip(&format!("link set {interface} master cable up"))?;
        Ok(card)
    }

    /// Pulls a machine's plug.
    pub fn pull(&self, card: &Card) -> Result<()> {
        ip(&format!("link set {} nomaster", card.interface()))
    }

    /// The cable goes, and whatever cards are still there.
    pub fn remove(self, cards: &[Card]) -> Result<()> {
        for card in cards {
            ip(&format!("link del {}", card.interface()))?;
        }
        ip("link del cable")
    }
}

impl Card {
    /// The machine's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's address.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 98, 0, self.number)
    }

    fn interface(&self) -> String {
        format!("tap-{}", self.name)
    }

    /// For qemu.
    pub fn options(&self) -> Vec<String> {
        let (interface, number) = (self.interface(), self.number);
        let netdev = format!("tap,id=card,ifname={interface},script=no,downscript=no");
        let device = format!("virtio-net-pci,netdev=card,romfile=,mac=02:6c:6d:76:6d:{number:02x}");
        vec!["-netdev".to_owned(), netdev, "-device".to_owned(), device]
    }

    /// What a machine's shell does to use it.
    pub fn script(&self) -> String {
        let (address, number) = (self.address(), self.number);
        // A bridge without an address of its own takes its ports', and changes it when a container comes or goes.
        format!(
            "ip link add {BRIDGE} address 02:6c:6d:62:72:{number:02x} type bridge
             ip link set eth0 master {BRIDGE} up
             ip address add {address}/{PREFIX} dev {BRIDGE}
             ip link set {BRIDGE} up"
        )
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("running ip")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
