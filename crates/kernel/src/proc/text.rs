//! The text of `/proc`: lines, fields and numbers, taken from bytes that nobody vouches for.

use std::borrow::Cow;

/// A line or field of a `/proc` file that does not have the form the kernel gives it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} not understood in {text:?}")]
pub struct ParseError {
    /// The field or line that was expected: `VmFlags`, `start address`.
    pub what: &'static str,
    /// The text it was looked for in, at most [`ParseError::EXCERPT`] bytes of it.
    pub text: String,
}

impl ParseError {
    /// How many bytes of the offending text an error quotes.
    pub const EXCERPT: usize = 80;

    /// `what` could not be found in `text`.
    pub fn new(what: &'static str, text: &[u8]) -> Self {
        let excerpt = text.get(..Self::EXCERPT).unwrap_or(text);
        Self { what, text: String::from_utf8_lossy(excerpt).into_owned() }
    }
}

/// What a parser of this module gives.
pub type Parsed<T> = Result<T, ParseError>;

/// The non-empty lines of `text`, without their newlines.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        (!rest.is_empty()).then(|| {
            let (line, tail) = split_once(rest, b'\n').unwrap_or((rest, b""));
            rest = tail;
            line
        })
    })
    .filter(|line| !line.is_empty())
}

/// The fields of `line`, separated by any number of spaces or tabs.
pub(crate) fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|&byte| byte == b' ' || byte == b'\t').filter(|field| !field.is_empty())
}

/// `Key:   value` split at its first colon, with the blanks around the value removed.
pub(crate) fn key_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (key, value) = split_once(line, b':')?;
    Some((key, value.trim_ascii()))
}

/// `text` before and after the first `separator`.
pub(crate) fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = memchr::memchr(separator, text)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

/// A number in the given radix made of digits only (no sign, no prefix), if it fits 64 bits.
pub(crate) fn unsigned(digits: &[u8], radix: u64) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            b'A'..=b'F' => digit - b'A' + 10,
            _ => return None,
        };
        let digit = u64::from(digit);
        if digit >= radix {
            return None;
        }
        value.checked_mul(radix)?.checked_add(digit)
    })
}

/// A decimal number with an optional minus, if it fits 64 bits.
pub(crate) fn signed(digits: &[u8]) -> Option<i64> {
    match digits.strip_prefix(b"-") {
        Some(magnitude) => 0i64.checked_sub_unsigned(unsigned(magnitude, 10)?),
        None => i64::try_from(unsigned(digits, 10)?).ok(),
    }
}

/// A decimal number of any integer type.
pub(crate) fn decimal<T: Decimal>(field: &[u8], what: &'static str) -> Parsed<T> {
    T::from_digits(field).ok_or_else(|| ParseError::new(what, field))
}

/// A hexadecimal number without prefix.
pub(crate) fn hex(field: &[u8], what: &'static str) -> Parsed<u64> {
    unsigned(field, 16).ok_or_else(|| ParseError::new(what, field))
}

/// A hexadecimal number without prefix that fits 32 bits.
pub(crate) fn hex32(field: &[u8], what: &'static str) -> Parsed<u32> {
    hex(field, what)?.try_into().map_err(|_| ParseError::new(what, field))
}

/// An octal number that fits 32 bits.
pub(crate) fn octal32(field: &[u8], what: &'static str) -> Parsed<u32> {
    unsigned(field, 8).and_then(|value| value.try_into().ok()).ok_or_else(|| ParseError::new(what, field))
}

/// All fields of `line` as decimal numbers.
pub(crate) fn decimals<T: Decimal>(line: &[u8], what: &'static str) -> Parsed<Vec<T>> {
    fields(line).map(|field| decimal(field, what)).collect()
}

/// An integer that `/proc` prints in decimal.
pub(crate) trait Decimal: Sized {
    fn from_digits(digits: &[u8]) -> Option<Self>;
}

impl Decimal for u64 {
    fn from_digits(digits: &[u8]) -> Option<Self> {
        unsigned(digits, 10)
    }
}

impl Decimal for u32 {
    fn from_digits(digits: &[u8]) -> Option<Self> {
        unsigned(digits, 10)?.try_into().ok()
    }
}

impl Decimal for i64 {
    fn from_digits(digits: &[u8]) -> Option<Self> {
        signed(digits)
    }
}

impl Decimal for i32 {
    fn from_digits(digits: &[u8]) -> Option<Self> {
        signed(digits)?.try_into().ok()
    }
}

/// Undoes the kernel's `\ooo` escapes of the bytes for which `escaped` is true; other backslashes stay.
///
/// `/proc/PID/maps` escapes only the newline, `mountinfo` also space, tab, backslash and `#`
/// (`seq_path`, `mangle_path` in `fs/seq_file.c`).
pub(crate) fn unescape(text: &[u8], escaped: fn(u8) -> bool) -> Cow<'_, [u8]> {
    if !text.contains(&b'\\') {
        return Cow::Borrowed(text);
    }
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = if byte == b'\\' { tail.get(..3) } else { None };
        let decoded = code
            .and_then(|code| unsigned(code, 8))
            .and_then(|value| u8::try_from(value).ok())
            .filter(|&b| escaped(b));
        if let Some(decoded) = decoded {
            plain.push(decoded);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            plain.push(byte);
            rest = tail;
        }
    }
    Cow::Owned(plain)
}
