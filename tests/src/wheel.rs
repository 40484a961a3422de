//! Wheels made on the spot: zip files with stored members.

/// A wheel with these members.
pub fn wheel(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = Vec::new();
    let mut directory = Vec::new();
    for (name, bytes) in members {
        let start = zip.len();
        let size = number(bytes.len());
        // What the local header and the directory entry share: version, flags, method "stored",
        // time, checksum, sizes, length of the name, no extra field.
        let mut shared = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        shared.extend(crc32(bytes).to_le_bytes());
        shared.extend(size.to_le_bytes());
        shared.extend(size.to_le_bytes());
        shared.extend(u16::try_from(name.len()).expect("a short name").to_le_bytes());
        shared.extend([0, 0]);

        zip.extend(b"PK\x03\x04");
        zip.extend(&shared);
        zip.extend(name.as_bytes());
        zip.extend(*bytes);

        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&shared);
        // No comment, first disk, no attributes.
        directory.extend([0; 10]);
        directory.extend(number(start).to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (count, start) = (u16::try_from(members.len()).expect("few members"), zip.len());
    zip.extend(&directory);
    zip.extend(b"PK\x05\x06\0\0\0\0");
    zip.extend(count.to_le_bytes());
    zip.extend(count.to_le_bytes());
    zip.extend(number(directory.len()).to_le_bytes());
    zip.extend(number(start).to_le_bytes());
    zip.extend([0, 0]);
    zip
}

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("a small wheel")
}

/// The checksum of zip and gzip (CRC-32, reflected polynomial `0xEDB88320`).
fn crc32(bytes: &[u8]) -> u32 {
    let mut table = [0_u32; 256];
    for (at, entry) in (0_u32..).zip(&mut table) {
        *entry = (0..8).fold(at, |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()));
    }
    !bytes
        .iter()
        .fold(u32::MAX, |crc, byte| (crc >> 8) ^ table[usize::from(crc.to_le_bytes()[0] ^ byte)])
}

#[test]
fn the_checksum_is_the_usual_one() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}
