//! Type-length-value fields of a header.

use super::malformed::MalformedHeader;

/// One TLV of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tlv<'a> {
    /// Its type, for instance [`kind::AWS`](super::kind::AWS).
    pub kind: u8,
    /// Its value, without type and length.
    pub value: &'a [u8],
}

/// The TLVs of a header that was found to be well-formed, in the order in which they stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tlvs<'a> {
    rest: &'a [u8],
}

impl<'a> Tlvs<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The bytes as they stand in the header.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = Tlv<'a>;

    fn next(&mut self) -> Option<Tlv<'a>> {
        let (tlv, rest) = split(self.rest).ok()??;
        self.rest = rest;
        Some(tlv)
    }
}

/// Takes the first TLV off `bytes`; `None` at their end.
///
/// # Errors
/// [`MalformedHeader::TlvOverrun`] where type and length are cut off, or the value is.
#[inline]
pub(super) fn split(bytes: &[u8]) -> Result<Option<(Tlv<'_>, &[u8])>, MalformedHeader> {
    let Some((&[kind, high, low], rest)) = bytes.split_first_chunk() else {
        return if bytes.is_empty() { Ok(None) } else { Err(MalformedHeader::TlvOverrun) };
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    let (value, rest) = rest.split_at_checked(len).ok_or(MalformedHeader::TlvOverrun)?;
    Ok(Some((Tlv { kind, value }, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tlvs_come_in_order() {
        let mut tlvs = Tlvs::new(&[4, 0, 0, 5, 0, 2, 7, 8]);
        assert_eq!(tlvs.next(), Some(Tlv { kind: 4, value: &[] }));
        assert_eq!(tlvs.as_bytes(), &[5, 0, 2, 7, 8]);
        assert_eq!(tlvs.next(), Some(Tlv { kind: 5, value: &[7, 8] }));
        assert_eq!(tlvs.next(), None);
    }

    #[test]
    fn truncated_tlv_is_an_overrun() {
        for bytes in [&[4][..], &[4, 0], &[4, 0, 1], &[4, 1, 0, 0]] {
            assert_eq!(split(bytes), Err(MalformedHeader::TlvOverrun));
            assert_eq!(Tlvs::new(bytes).next(), None);
        }
    }
}
