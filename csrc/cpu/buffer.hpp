// Memory that grows when asked for more and is kept: steady work allocates nothing.
#pragma once

#include <cstddef>
#include <new>

namespace gangline {

constexpr std::size_t cache_line = 64;
// What a buffer of so many bytes takes.
constexpr std::size_t rounded_to_lines(std::size_t bytes) { return (bytes + cache_line - 1) / cache_line * cache_line; }

template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    // At least `count` values from now on. What the buffer held may be lost.
    T* want(std::size_t count) {
        if (count > capacity_) {
            release();
            capacity_ = 0;
            data_ = static_cast<T*>(::operator new(rounded_to_lines(count * sizeof(T)), std::align_val_t{cache_line}));
            capacity_ = count;
        }
        return data_;
    }
    // Gives the memory back.
    void free() {
        release();
        capacity_ = 0;
    }
    T* data() const { return data_; }
    std::size_t bytes() const { return capacity_ * sizeof(T); }

private:
    void release() {
        if (data_ != nullptr) ::operator delete(data_, std::align_val_t{cache_line});
        data_ = nullptr;
    }

    T* data_ = nullptr;
    std::size_t capacity_ = 0;
};

}  // namespace gangline
