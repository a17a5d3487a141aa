// How functions of the C API fail.
#pragma once

#include "allocmoe.h"
#include "allocmoe-file.h"

#include <exception>
#include <new>

// Remembers what is wrong for allocmoe_last_error, and returns the status.
int32_t allocmoe_fail(int32_t status, const char * what) noexcept;

// What f returns, or the status for what it throws.
template <class F>
int32_t allocmoe_guarded(F && f) noexcept {
    try {
        return f();
    } catch (const allocmoe_error & error) {
        return allocmoe_fail(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return allocmoe_fail(ALLOCMOE_ERR_MEMORY, "no memory left");
    } catch (const std::exception & error) {
        return allocmoe_fail(ALLOCMOE_ERR_OTHER, error.what());
    } catch (...) {
        return allocmoe_fail(ALLOCMOE_ERR_OTHER, "an unknown error");
    }
}
