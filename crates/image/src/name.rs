//! Names of sections and blobs: the only strings of a checkpoint that ever become file names.

/// The longest name, in bytes.
pub const MAX_NAME: usize = 128;

/// Whether `name` may name a section or a blob: 1 to 128 bytes of `a-z`, `0-9`, `.`, `_` and `-`, not
/// starting with a dot. So it is one path component, is neither `.` nor `..`, and is never hidden.
pub fn is_valid(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=MAX_NAME).contains(&bytes.len())
        && bytes[0] != b'.'
        && bytes.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_lower_case_components_are_names() {
        for good in ["a", "tasks", "pipe.3", "deleted-file_0", &"x".repeat(128)] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "/a", "../a", "A", "a\0", "a b", "ä", &"x".repeat(129)]
        {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}
