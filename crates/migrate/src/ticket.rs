//! One-time tickets: what `limosa receive --listen` prints and `limosa migrate` is given.
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 1 | version of the ticket, 1 |
//! | 1 | 20 | the secret: 160 random bits |
//! | 21 | 32 | the pin: BLAKE3 of the listener's certificate (DER) |
//! | 53 | 4 | CRC-32C of the above, little endian: tells a typing error from a wrong ticket |
//!
//! in base64url without padding (RFC 4648, section 5): 76 characters.
//!
//! Each side proves that it has the ticket by a keyed BLAKE3 over its role, the purpose of the connection and keying
//! material exported from this very TLS session (RFC 8446, section 7.5), so a proof is worth nothing on another one.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::outcome::Purpose;

const VERSION: u8 = 1;
const SECRET_BYTES: usize = 20;
const BYTES: usize = 1 + SECRET_BYTES + 32 + 4;
/// Bytes of a proof.
pub(crate) const PROOF_BYTES: usize = 32;

/// A one-time ticket. It is a secret: `Debug` does not show it, `Display` does.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    secret: [u8; SECRET_BYTES],
    pin: [u8; 32],
}

/// Text that is not a ticket.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// Not as long as a ticket is.
    #[error("the ticket has {got} characters instead of 76: copy all of it")]
    Length {
        /// The length of the text.
        got: usize,
    },
    /// A character that no ticket has.
    #[error("the ticket contains a character that no ticket has (they consist of A-Z a-z 0-9 - _)")]
    Characters,
    /// The checksum is wrong.
    #[error("the ticket has a typing error: its checksum is wrong")]
    Checksum,
    /// From another version of Limosa.
    #[error("the ticket has version {got}; this program knows version 1")]
    Version {
        /// The ticket's version.
        got: u8,
    },
}

/// Which side a proof is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Ticket {
    /// A new secret, for the listener with this certificate.
    pub(crate) fn new(certificate: &[u8]) -> std::io::Result<Self> {
        let mut secret = [0; SECRET_BYTES];
        crate::id::random_bytes(&mut secret)?;
        Ok(Self { secret, pin: *blake3::hash(certificate).as_bytes() })
    }

    /// Whether this is the listener's certificate.
    pub(crate) fn pins(&self, certificate: &[u8]) -> bool {
        // blake3::Hash compares in constant time.
        blake3::hash(certificate) == blake3::Hash::from_bytes(self.pin)
    }

    /// The proof of having the ticket, for one TLS session.
    pub(crate) fn proof(&self, role: Role, purpose: Purpose, keying_material: &[u8; 32]) -> blake3::Hash {
        let key = blake3::derive_key("limosa migration 2026-11 proof of a ticket", &self.secret);
        let role: &[u8] = match role {
            Role::Source => b"source",
            Role::Destination => b"destination",
        };
        let mut hasher = blake3::Hasher::new_keyed(&key);
        hasher.update(&[role.len() as u8]).update(role).update(&[purpose.to_wire()]).update(keying_material);
        hasher.finalize()
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&self.pin);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        f.write_str(&URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(secret)")
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        if text.len() != BYTES.div_ceil(3) * 4 {
            return Err(TicketError::Length { got: text.chars().count() });
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| TicketError::Characters)?;
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or(TicketError::Length { got: text.len() })?;
        if crc32c::crc32c(body).to_le_bytes() != *sum {
            return Err(TicketError::Checksum);
        }
        match body.split_first() {
            Some((&VERSION, rest)) => {
                let (secret, pin) =
                    rest.split_first_chunk().ok_or(TicketError::Length { got: text.len() })?;
                let pin = pin.try_into().map_err(|_| TicketError::Length { got: text.len() })?;
                Ok(Self { secret: *secret, pin })
            }
            other => Err(TicketError::Version { got: other.map_or(0, |(version, _)| *version) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Role, Ticket, TicketError};
    use crate::outcome::Purpose;

    #[test]
    fn text_and_back() {
        let ticket = Ticket::new(b"certificate").expect("ticket");
        let text = ticket.to_string();
        assert_eq!(text.len(), 76);
        assert_eq!(text.parse::<Ticket>().expect("parse"), ticket);
        assert!(ticket.pins(b"certificate") && !ticket.pins(b"another"));
        assert!(!format!("{ticket:?}").contains(&text[2..20]), "Debug shows no secret");
    }

    #[test]
    fn every_typing_error_is_found_without_asking_the_listener() {
        let text = Ticket::new(b"certificate").expect("ticket").to_string();
        for at in 0..text.len() {
            for wrong in ['A', 'z', '7', '-', '%'] {
                let mut typed: Vec<char> = text.chars().collect();
                if typed[at] == wrong {
                    continue;
                }
                typed[at] = wrong;
                let typed: String = typed.into_iter().collect();
                let error = typed.parse::<Ticket>().expect_err("a typing error");
                assert!(matches!(error, TicketError::Checksum | TicketError::Characters), "{error}");
            }
        }
        assert!(matches!(text[1..].parse::<Ticket>(), Err(TicketError::Length { got: 75 })));
    }

    #[test]
    fn a_proof_is_good_for_one_role_one_purpose_and_one_session() {
        let ticket = Ticket::new(b"certificate").expect("ticket");
        let other = Ticket::new(b"certificate").expect("ticket");
        let proof = ticket.proof(Role::Source, Purpose::Migrate, &[1; 32]);
        assert_eq!(proof, ticket.proof(Role::Source, Purpose::Migrate, &[1; 32]));
        assert_ne!(proof, ticket.proof(Role::Destination, Purpose::Migrate, &[1; 32]));
        assert_ne!(proof, ticket.proof(Role::Source, Purpose::Ask, &[1; 32]));
        assert_ne!(proof, ticket.proof(Role::Source, Purpose::Migrate, &[2; 32]));
        assert_ne!(proof, other.proof(Role::Source, Purpose::Migrate, &[1; 32]));
    }
}
