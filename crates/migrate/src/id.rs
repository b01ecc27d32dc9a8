//! The name of one migration.

use std::fmt;
use std::str::FromStr;

/// 128 random bits, chosen by the source; never reused, also not for another attempt with the same container.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MigrationId([u8; 16]);

impl MigrationId {
    /// A new random id.
    ///
    /// # Errors
    /// The kernel's random source failed.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        random_bytes(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The id of these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// Fills `bytes` from the kernel's random source (getrandom(2)).
pub(crate) fn random_bytes(bytes: &mut [u8]) -> std::io::Result<()> {
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        have += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

/// Text that is not the name of a migration.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a migration's id (32 hexadecimal digits)")]
pub struct IdError {
    /// The text.
    pub text: String,
}

impl FromStr for MigrationId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError { text: text.chars().take(64).collect() };
        if text.len() != 32
            || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        {
            return Err(wrong());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| wrong())
    }
}

impl TryFrom<String> for MigrationId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::MigrationId;

    #[test]
    fn text_and_back() {
        let id = MigrationId::random().expect("random bytes");
        assert_eq!(id.to_string().parse::<MigrationId>().expect("parse"), id);
        for wrong in ["", "00", "../../../../etc/passwd0000000000", &"g".repeat(32), &"+".repeat(32)] {
            assert!(wrong.parse::<MigrationId>().is_err(), "{wrong}");
        }
    }
}
